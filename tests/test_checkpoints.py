"""Checkpoints as files: pieces cover tensors exactly, damage is always found, and nothing in a file is ever run."""

import errno
import hashlib
import io
import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from configs import LonghaulError
from tests.workers import in_processes, state_of
from trainer.checkpoints.files import METADATA, contents, load, write
from trainer.checkpoints.manifest import (
    FORMAT,
    Broken,
    Saved,
    newest_valid,
    open_checkpoint,
    open_valid,
    parse,
    render,
)
from trainer.checkpoints.state import Piece, boxes
from trainer.checkpoints.store import MANIFEST, DirectoryStore, age
from trainer.group import Rendezvous, free_port, join
from trainer.rundir import RunDirectory


@pytest.fixture(scope="module")
def checkpoint(digits_run: RunDirectory) -> Saved:
    """A real one, read only: ResNet-20 with momentum and ledger."""
    saved = newest_valid(digits_run.store())
    assert saved is not None
    return saved


@pytest.fixture
def copy(checkpoint: Saved, tmp_path: Path) -> Saved:
    """A copy to damage."""
    shutil.copytree(str(checkpoint), tmp_path / checkpoint.name)
    return open_checkpoint(DirectoryStore(tmp_path), checkpoint.name)


# --- pieces --------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(torch.Size)


@st.composite
def runs_of(draw: st.DrawFn) -> tuple[torch.Size, int, int]:
    """A shape, and the start and length of a run of its elements."""
    shape = draw(shapes)
    start = draw(st.integers(0, shape.numel()))
    return shape, start, draw(st.integers(0, shape.numel() - start))


@given(runs_of())
def test_boxes_are_the_elements_in_their_order(run: tuple[torch.Size, int, int]) -> None:
    shape, start, length = run
    whole = torch.arange(shape.numel()).view(shape)
    found, at = [], 0
    for box in boxes(shape, start, length):
        assert box.at == at and box.count > 0
        part = whole[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))]
        found += part.flatten().tolist()
        at += box.count
    assert found == list(range(start, start + length)), "disjoint, in order, and all of them"
    assert len(list(boxes(shape, start, length))) <= 2 * len(shape) - 1


@given(runs_of())
def test_a_view_of_a_piece_is_the_box_of_the_whole(run: tuple[torch.Size, int, int]) -> None:
    shape, start, length = run
    whole = torch.rand(shape)
    values = whole.flatten()[start : start + length].clone()
    piece = Piece(shape, start, values)
    for box in boxes(shape, start, length):
        part = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
        assert torch.equal(piece.view(box.offsets), whole[part])
        assert piece.view(box.offsets).untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def random_tensors(seed: int, number: int) -> dict[str, torch.Tensor]:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    return {
        f"t{i}": torch.rand([generator.randint(1, 6) for _ in range(generator.randint(1, 4))]) for i in range(number)
    }


def random_pieces(tensors: dict[str, torch.Tensor], parts: int, seed: int) -> list[dict[str, Piece]]:
    """Every tensor cut at random places, a run of elements for each of so many ranks; some are empty."""
    generator = random.Random(seed)
    shares: list[dict[str, Piece]] = [{} for _ in range(parts)]
    for name, tensor in tensors.items():
        cuts = sorted(generator.randint(0, tensor.numel()) for _ in range(parts - 1))
        for share, start, end in zip(shares, [0, *cuts], [*cuts, tensor.numel()], strict=True):
            share[name] = Piece(tensor.shape, start, tensor.flatten()[start:end].clone())
    return shares


def save_pieces(path: Path, seed: int) -> dict[str, Any]:
    """What a worker does: write its share of 40 tensors, and one tensor that all hold."""
    place = Rendezvous.from_environment()
    with join(place, torch.device("cpu"), timeout_seconds=60) as group:
        store = DirectoryStore(path)
        if group.rank == 0:
            store.begin("draft")
        group.barrier()
        share = random_pieces(random_tensors(seed, 40), place.world_size, seed)[place.rank]
        return write({**share, "all": torch.arange(12.0)}, store, "draft", group.saving)


def test_pieces_are_read_back_into_any_other_pieces(tmp_path: Path) -> None:
    written = in_processes(3, save_pieces, tmp_path, 5)
    store = DirectoryStore(tmp_path)
    store.commit("draft", "step-00000001", manifest_of({name: mark for own in written for name, mark in own.items()}))
    saved = open_valid(store, "step-00000001")
    tensors = random_tensors(5, 40)
    assert {name: entry.shape for name, entry in contents(saved).items() if name != "all"} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert torch.equal(state_of(saved).pop("all"), torch.arange(12.0))
    for parts in (1, 2, 5):
        for share in random_pieces(tensors, parts, 77 + parts):
            wanted = {name: piece.values.clone() for name, piece in share.items()}
            for piece in share.values():
                piece.values.fill_(float("nan"))
            load(saved, {**share})
            assert all(torch.equal(share[name].values, values) for name, values in wanted.items())


def manifest_of(files: dict[str, Any], step: int = 1) -> bytes:
    return render({"format": FORMAT, "step": step, "world_size": 1, "files": files})


def marks(directory: Path) -> dict[str, Any]:
    """What the manifest must say of the files in a directory."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in directory.iterdir()
        if path.name != MANIFEST
    }


# --- damage --------------------------------------------------------------------------------------------------------


def test_every_changed_bit_of_a_manifest_is_found(copy: Saved) -> None:
    path = Path(str(copy)) / MANIFEST
    sound = path.read_bytes()
    for at in range(len(sound)):
        for bit in range(8):
            data = bytearray(sound)
            data[at] ^= 1 << bit
            with pytest.raises(ValueError):
                parse(bytes(data))
    for data in (b"", sound[:-1], sound + b"\n", sound + b" ", b"{}", b"[]", b"null", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(Broken, match=r"manifest\.json does not have the bytes that were saved"):
            open_checkpoint(copy.store, copy.name)


@settings(max_examples=40)
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_found(checkpoint: Saved, data: st.DataObject) -> None:
    """Of the checkpoint itself, put right again: the hashes cost less than copies."""
    file = data.draw(st.sampled_from(sorted(path.name for path in Path(str(checkpoint)).iterdir())))
    path = Path(str(checkpoint)) / file
    sound = path.read_bytes()
    at = data.draw(st.integers(0, len(sound) - 1))
    damaged = bytearray(sound)
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(damaged)
        with pytest.raises(Broken, match=f"{file} does not have the bytes that were saved"):
            open_valid(checkpoint.store, checkpoint.name)
    finally:
        path.write_bytes(sound)
    open_valid(checkpoint.store, checkpoint.name)


@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "a directory"])
def test_files_of_another_length_or_kind_are_found(copy: Saved, damage: str) -> None:
    for path in sorted(Path(str(copy)).iterdir()):
        sound = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(sound[:-1])
        elif damage == "longer":
            path.write_bytes(sound + b"\0")
        elif damage == "a directory":
            path.mkdir()
        with pytest.raises(Broken, match=path.name):
            open_valid(copy.store, copy.name)
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(sound)
    open_valid(copy.store, copy.name)


def test_a_storage_that_does_not_answer_condemns_no_checkpoint(copy: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale NFS handle, say: to go on without the checkpoint would throw its work away."""
    sound = DirectoryStore.open

    def fail(number: int) -> None:
        def stale(self: DirectoryStore, name: str, file: str) -> Any:
            if file != MANIFEST:
                raise OSError(number, "trouble")
            return sound(self, name, file)

        monkeypatch.setattr(DirectoryStore, "open", stale)

    fail(errno.ESTALE)
    with pytest.raises(LonghaulError, match=r"cannot be read .*trouble.*: check the storage") as found:
        newest_valid(copy.store)
    assert not isinstance(found.value, Broken)
    fail(errno.EIO)  # a bad sector
    assert newest_valid(copy.store) is None


@pytest.mark.parametrize("manifest", [{"format": 3, "step": 5, "files": {}}, {"format": 9, "step": 5, "files": {}}])
def test_another_version_s_checkpoint_is_refused_and_not_broken(copy: Saved, manifest: dict[str, Any]) -> None:
    data = render(manifest) if manifest["format"] > FORMAT else json.dumps(manifest, indent=1).encode()
    (Path(str(copy)) / MANIFEST).write_bytes(data)
    with pytest.raises(LonghaulError, match=f"has format {manifest['format']}, this version reads {FORMAT}") as found:
        newest_valid(copy.store)
    assert not isinstance(found.value, Broken)


# --- what a file says is never run ---------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def forge(saved: Saved, file: str, data: bytes) -> Saved:
    """Put other bytes into a file, and hash it anew as who forges would."""
    directory = Path(str(saved))
    (directory / file).write_bytes(data)
    (directory / MANIFEST).write_bytes(render({**saved.manifest, "files": marks(directory)}))
    return open_valid(saved.store, saved.name)


def test_metadata_that_run_something_are_refused(copy: Saved, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(ran)))
    assert ran.exists(), "that is what a pickle can do"
    ran.unlink()
    forged = forge(copy, METADATA, pickle.dumps(Evil(ran)))
    for act in (lambda: contents(forged), lambda: load(forged, {"progress.step": torch.tensor(0)})):
        with pytest.raises(LonghaulError, match=r"\.metadata cannot be used: .* asks for pathlib\.Path"):
            act()
    assert not ran.exists()


def test_metadata_that_hide_something_are_refused(copy: Saved, tmp_path: Path) -> None:
    """As an attribute, inside DCP's own classes, by a class's state, and as an object for DCP to unpickle later on."""
    ran = tmp_path / "ran"
    sound = (Path(str(copy)) / METADATA).read_bytes()
    for spoil in ("planner_data", "version", "entry", "bytes"):
        metadata = pickle.loads(sound)
        if spoil == "entry":
            next(iter(metadata.state_dict_metadata.values())).properties.layout = Evil(ran)
        elif spoil == "bytes":
            metadata.state_dict_metadata["progress.step"] = BytesStorageMetadata()
        else:
            setattr(metadata, spoil, Evil(ran))
        forged = forge(copy, METADATA, pickle.dumps(metadata))
        with pytest.raises(LonghaulError, match=r"\.metadata cannot be used"):
            load(forged, {"progress.step": torch.tensor(0)})
        assert not ran.exists()
    forge(copy, METADATA, sound)
    assert int(state_of(copy)["progress.step"]) == 40


@pytest.mark.parametrize("data", [b"", b"\x80", b"nonsense", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([1]))])
def test_metadata_that_are_none_are_refused(copy: Saved, data: bytes) -> None:
    with pytest.raises(LonghaulError, match=r"step-00000040/\.metadata cannot be used: "):
        contents(forge(copy, METADATA, data))


def test_tensors_that_run_something_are_refused(copy: Saved, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    stream = io.BytesIO()
    torch.save(Evil(ran), stream)
    metadata = pickle.loads((Path(str(copy)) / METADATA).read_bytes())
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == "progress.step")
    place.offset, place.length = 0, len(stream.getvalue())
    forge(copy, METADATA, pickle.dumps(metadata))
    forged = forge(copy, place.relative_path, stream.getvalue())
    with pytest.raises(LonghaulError, match="does not fit this run: Weights only load failed"):
        load(forged, {"progress.step": torch.tensor(0)})
    assert not ran.exists()
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert ran.exists(), "the bytes would have run"


def test_a_file_outside_the_checkpoint_is_not_opened(copy: Saved, tmp_path: Path) -> None:
    metadata = pickle.loads((Path(str(copy)) / METADATA).read_bytes())
    shutil.move(Path(str(copy)) / "__0_0.distcp", tmp_path / "__0_0.distcp")
    for place in metadata.storage_data.values():
        place.relative_path = f"../{place.relative_path}"
    forged = forge(copy, METADATA, pickle.dumps(metadata))
    with pytest.raises(LonghaulError, match="No such file"):
        load(forged, {"progress.step": torch.tensor(0)})


# --- a directory ---------------------------------------------------------------------------------------------------


def draft(store: DirectoryStore, step: int, attempt: int, text: bytes = b"x") -> str:
    """A draft with one file and not yet a manifest."""
    name = f"step-{step:08d}-attempt{attempt}"
    store.begin(name)
    with store.create(name, "__0_0.distcp") as out:
        out.write(text)
    return name


def files_of(text: bytes) -> dict[str, Any]:
    return {"__0_0.distcp": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DirectoryStore]:
    yield DirectoryStore(tmp_path / "checkpoints")


def test_a_draft_is_no_checkpoint_until_it_is_committed(store: DirectoryStore) -> None:
    store.sweep()
    assert store.names() == []
    name = draft(store, 5, 1)
    assert store.names() == []
    assert store.commit(name, "step-00000005", manifest_of(files_of(b"x"), 5)) == "step-00000005"
    assert newest_valid(store) == open_valid(store, "step-00000005")
    assert sorted(path.name for path in store.path.iterdir()) == ["step-00000005"]
    store.remove("step-00000005")
    assert list(store.path.iterdir()) == []


def test_nothing_is_written_into_twice(store: DirectoryStore) -> None:
    name = draft(store, 5, 1)
    with pytest.raises(FileExistsError):
        store.begin(name)
    with pytest.raises(FileExistsError):
        store.create(name, "__0_0.distcp")


def test_a_worker_of_an_earlier_attempt_that_still_writes_does_no_harm(store: DirectoryStore) -> None:
    zombie = draft(store, 5, 1, b"old")
    late = store.create(zombie, "__1_0.distcp")
    DirectoryStore(store.path).sweep()
    assert list(store.path.iterdir()) == []
    with late as out:
        out.write(b"into a file that has no name any more")
    with pytest.raises(FileNotFoundError):
        store.create(zombie, "__2_0.distcp")
    ours = draft(store, 5, 2, b"new")
    with pytest.raises(FileNotFoundError):
        store.commit(zombie, "step-00000005", manifest_of(files_of(b"old"), 5))
    store.commit(ours, "step-00000005", manifest_of(files_of(b"new"), 5))
    assert store.open("step-00000005", "__0_0.distcp").read() == b"new"


def test_of_a_commit_of_an_earlier_attempt_that_comes_first_both_are_kept(store: DirectoryStore) -> None:
    zombie, ours = draft(store, 5, 1, b"old"), draft(store, 5, 2, b"new")
    store.commit(zombie, "step-00000005", manifest_of(files_of(b"old"), 5))
    store.commit(ours, "step-00000005", manifest_of(files_of(b"new"), 5))
    open_valid(store, "step-00000005")
    assert store.open("step-00000005", "__0_0.distcp").read() == b"new"
    assert list(store.path.glob("replaced-step-00000005-*/__0_0.distcp"))


def test_what_is_set_aside_is_kept_and_no_longer_a_checkpoint(store: DirectoryStore) -> None:
    store.commit(draft(store, 5, 1), "step-00000005", manifest_of(files_of(b"x"), 5))
    place = Path(store.set_aside("step-00000005", "broken"))
    assert store.names() == [] and (place / "__0_0.distcp").read_bytes() == b"x"
    store.sweep()
    assert place.is_dir()


def test_names_sort_by_step_and_then_by_attempt() -> None:
    names = ["step-00000009", "step-00000010-attempt2", "step-00000010-attempt10", "step-100000000"]
    assert sorted([names[i] for i in (2, 3, 0, 1)], key=age) == names


def test_a_full_disk_is_told_by_its_own_name(small_disk: Path) -> None:
    """torch.save, which writes through our file, tells only of an unexpected position."""
    store = DirectoryStore(small_disk / "checkpoints")
    with join(Rendezvous(0, 1, 0, "127.0.0.1", free_port()), torch.device("cpu"), 60) as group:
        store.begin("draft")
        with pytest.raises(OSError, match="No space left on device"):
            write({"x": torch.zeros(2**20)}, store, "draft", group.saving)
    store.discard("draft")
    assert list(store.path.iterdir()) == []
    assert not dist.is_initialized()
