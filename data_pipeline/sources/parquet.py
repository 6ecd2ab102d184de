"""Parquet files with encoded images in a column, as the Hugging Face Hub lays out ImageNet."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from configs import LonghaulError
from data_pipeline.sources.base import Item, Listing
from data_pipeline.sources.labels import Label, index_labels, splits_of_files
from data_pipeline.sources.splits import hold_out, unique_keys
from data_pipeline.sources.storage import Store
from data_pipeline.sources.tree import clean_name

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "cls", "fine_label")
_WINDOW_BYTES = 128 * 2**20  # of images that are held while they are read out of order


class _Table(NamedTuple):
    """What is listed of a file. `paths` are None where there are none."""

    labels: list[Label]
    paths: list[str | None]
    sizes: list[int]
    names: list[str] | None


class Parquet:
    """Parquet files with one image a row.

    The column of images ("image" or the like) is binary, or a struct with the binary field `bytes` and maybe `path`;
    the column of labels ("label" or "cls") holds integers or strings. The names of classes come from the metadata that
    the library `datasets` writes (key "huggingface": features, `ClassLabel`). A key is the image's path, or the file
    and row where there is none.

    A row group is read for any one of its images. So shards from everywhere read each row group many times.
    """

    sequential = True

    def __init__(self, name: str, store: Store, files: Sequence[str], holdout: float) -> None:
        self.name = name
        self._store = store
        self._files = sorted(files)
        self._holdout = holdout

    def listing(self) -> Listing:
        where = self._store.locate("" if len(self._files) > 1 else self._files[0])
        splits = splits_of_files(where, self._files)
        tables = [(file, self._list(file)) for file in splits]
        named = [(file, table.names) for file, table in tables if table.names is not None]
        for file, names in named:
            if names != named[0][1]:
                raise LonghaulError(f"{self._store.locate(file)} names other classes than {named[0][0]}: keep one set.")
        classes, labels = index_labels(
            where, [label for _, table in tables for label in table.labels], named[0][1] if named else None
        )
        label_of = iter(labels)
        items, places = [], []
        for file, table in tables:
            for row, (path, size) in enumerate(zip(table.paths, table.sizes, strict=True)):
                place = f"{file}:{row}"
                key = clean_name(path) if path else place
                items.append(Item(splits[file], next(label_of), key, f"{row}:{file}", size))
                places.append(place)
        if not any(item.split == "train" for item in items):
            raise LonghaulError(f"No training images in '{self.name}': its files have no rows.")
        return Listing(classes, hold_out(unique_keys(items, places), self._holdout))

    def read(self, items: Sequence[Item]) -> Iterator[bytes | OSError]:
        window: list[Item] = []
        held = 0
        for item in items:
            if held + item.size > _WINDOW_BYTES:
                yield from self._read_window(window)
                window, held = [], 0
            window.append(item)
            held += item.size
        yield from self._read_window(window)

    def _read_window(self, items: Sequence[Item]) -> Iterator[bytes | OSError]:
        rows: dict[str, dict[int, list[int]]] = {}  # file -> row -> places among the items
        for place, item in enumerate(items):
            number, _, file = item.path.partition(":")
            rows.setdefault(file, {}).setdefault(int(number), []).append(place)
        found: list[bytes | OSError] = [OSError()] * len(items)
        for file in sorted(rows):
            for row, data in self._read_rows(file, sorted(rows[file])):
                for asked in rows[file][row]:
                    found[asked] = data
        yield from found

    def _read_rows(self, file: str, rows: list[int]) -> Iterator[tuple[int, bytes | OSError]]:
        with self._store.open(file) as opened:
            parquet = self._open(file, opened)
            column, is_struct = _image_column(self._store.locate(file), parquet.schema_arrow)
            first, wanted = 0, iter(rows)
            row = next(wanted, None)
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                images: Any = None
                while row is not None and row < end:
                    if images is None:
                        images = _read_group(parquet, group, f"{column}.bytes" if is_struct else column)
                    yield row, images if isinstance(images, OSError) else _image(images[row - first])
                    row = next(wanted, None)
                first = end

    def _list(self, file: str) -> _Table:
        title = self._store.locate(file)
        with self._store.open(file) as opened:
            parquet = self._open(file, opened)
            schema = parquet.schema_arrow
            column, is_struct = _image_column(title, schema)
            label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
            if label is None:
                raise LonghaulError(f"{title} has no column of labels ({' or '.join(_LABEL_COLUMNS)}).")
            has_path = is_struct and schema.field(column).type.get_field_index("path") >= 0
            try:
                table = parquet.read([label, f"{column}.path"] if has_path else [label])
            except (pa.ArrowException, OSError) as error:
                raise _damaged(title, error) from None
            paths = table[column].combine_chunks().field("path").to_pylist() if has_path else [None] * len(table)
            labels = table[label].to_pylist()
            if not all(isinstance(one, int | str) for one in labels):
                raise LonghaulError(f"{title}: column {label} holds other than integers or strings: leave these out.")
            sizes: list[int] = []
            for group in map(parquet.metadata.row_group, range(parquet.num_row_groups)):
                columns = map(group.column, range(group.num_columns))
                bytes_in_group = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.startswith(column))
                sizes += [bytes_in_group // max(group.num_rows, 1)] * group.num_rows
            return _Table(labels, paths, sizes, _class_names(schema, label))

    def _open(self, file: str, opened: Any) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(opened, pre_buffer=True)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._store.locate(file), error) from None


def _image_column(title: str, schema: pa.Schema) -> tuple[str, bool]:
    """The name of the column of images, and whether it is a struct."""
    for name in _IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name, False
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return name, True
    raise LonghaulError(
        f"{title} has no column of encoded images: {' or '.join(_IMAGE_COLUMNS)}, binary or a struct with 'bytes'. "
        f"It has {', '.join(schema.names)}."
    )


def _read_group(parquet: pq.ParquetFile, group: int, column: str) -> pa.Array | OSError:
    try:
        (images,) = parquet.read_row_group(group, [column]).columns
    except (pa.ArrowException, OSError) as error:
        return OSError(f"row group {group} is damaged: {str(error).splitlines()[0]}")
    array = images.combine_chunks()
    return array.field("bytes") if pa.types.is_struct(array.type) else array


def _image(value: pa.Scalar) -> bytes | OSError:
    data = value.as_py()
    return OSError("the row has no bytes, at most a path") if data is None else data


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _damaged(title: str, error: Exception) -> LonghaulError:
    return LonghaulError(f"{title} is not whole ({(str(error).splitlines() or [''])[0]}): fetch or make it again.")
