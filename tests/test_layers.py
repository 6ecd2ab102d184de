"""The rooms import only leftwards: configs <- data_pipeline <- trainer <- cluster <- launch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([script, "--no-cache"], cwd=directory, capture_output=True, text=True)


def test_rooms_import_only_leftwards() -> None:
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout


def test_a_breach_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for room in ("configs", "data_pipeline", "trainer", "cluster", "launch"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("import cluster\n" if room == "trainer" else "")
    found = lint(tmp_path)
    assert found.returncode != 0 and "trainer -> cluster" in found.stdout
