"""The limit of a CPU input path: `limit.c`, a loop on libjpeg-turbo, built here with gcc and timed.

python -m benchmarks.data.limit PREPARED_DIR --work antialias --output float32 --images 4000 --threads 2 --batch 64
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.peers.common import WARMUP_BATCHES, arguments, jpeg_paths, report

SOURCE = Path(__file__).with_name("limit.c")
SIZE = 224


def build(folder: Path) -> Path:
    """Compile the loop for this machine into `folder` and return the program; needs gcc and libjpeg-turbo's header.

    Raises:
        RuntimeError: with the compiler's words, where it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "limit"
    command = [
        shutil.which("gcc") or "gcc",
        "-O3",
        "-march=native",
        "-o",
        program,
        SOURCE,
        "-ljpeg",
        "-lm",
        "-lpthread",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SOURCE} does not compile:\n{done.stderr}")
    return program


def crop(
    program: Path, jpeg: Path, work: str, output: str, box: tuple[int, int, int, int], flip: bool
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """One image as the loop makes it, [224, 224, 3]; `box` is (x, y, width, height) in pixels of the JPEG."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pixels"
        numbers = [str(int(n)) for n in (*box, flip)]
        subprocess.run([program, "one", jpeg, work, output, *numbers, out], check=True)
        return np.fromfile(out, output).reshape(SIZE, SIZE, 3)


def main() -> None:
    args = arguments(
        work=("full", "region", "bilinear", "antialias"),
        output=("float32", "uint8"),
        source=("folder", "folder-500-q90"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        program = build(Path(scratch))
        listed = Path(scratch) / "list"
        listed.write_text("".join(f"{path}\n" for path in jpeg_paths(args.prepared / args.source)))
        numbers = [str(n) for n in (args.threads, args.batch, WARMUP_BATCHES * args.batch, args.images)]
        command = [program, "bench", listed, args.work, args.output, *numbers]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    dtype, layout = ("none", "decoded only") if args.work in ("full", "region") else (args.output, "NHWC")
    report("limit", args, done["images"], done["seconds"], dtype, layout)


if __name__ == "__main__":
    main()
