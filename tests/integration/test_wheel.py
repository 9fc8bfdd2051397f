"""What is in the wheel: the package, all of it and nothing else. tests/campaigns/packages/wheel.py installs and uses
it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("hatchling", reason="hatchling is not installed (ops/venv dev)")


@pytest.mark.slow
def test_the_wheel_has_the_package_and_says_what_it_needs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = {name.partition("/")[0] for name in names} - {"continual"}
        words = archive.read(f"{about}/METADATA").decode()
        points = archive.read(f"{about}/entry_points.txt").decode().split()
    ours = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "continual").rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert {name for name in names if not name.startswith(about)} == ours
    assert f"{about}/licenses/LICENSE" in names
    assert points == ["[console_scripts]", "continual", "=", "continual.cli.main:main"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = Parser().parsestr(words)
    assert found["Version"] == project["version"]
    needed = [need.partition(";")[0] for need in found.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert len(needed) == len(project["dependencies"])
    assert found.get_payload().startswith("# continual\n"), "the README is its description"
