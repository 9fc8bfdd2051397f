"""The scripts of the image, outside of one: a state on the first start alone, what is said where that cannot be, the
daemon in the place of the script, the health check. tests/campaigns/packages/files.py has the image's files checked."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from continual.state import State
from tests.helpers import models, services

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "ops/container"


def free() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """The environment of a container that watches /in."""
    (tmp_path / "in").mkdir()
    here = f"{FOLDER}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"CONTINUAL_STATE": tmp_path / "a state", "CONTINUAL_WATCH": tmp_path / "in", "CONTINUAL_PORT": free()}
    return {**os.environ, "PATH": here, **{name: str(value) for name, value in settings.items()}}


def start(place: dict[str, str], *words: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["start", *words], env=place, capture_output=True, text=True, check=False, user=user)


@contextmanager
def running(place: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("a") as file, subprocess.Popen(["start", "run"], env=place, stdout=file, stderr=file) as process:
        try:
            services.until(
                lambda: services.get(f"http://127.0.0.1:{place['CONTINUAL_PORT']}/readyz")[0] == 200, "ready"
            )
            yield process
        finally:
            process.kill()


def healthy(place: dict[str, str]) -> int:
    return subprocess.run(["healthy"], env=place, capture_output=True, check=False).returncode


def test_the_first_start_makes_the_state_and_the_next_one_takes_it(tmp_path: Path, place: dict[str, str]) -> None:
    place |= {"INIT_BASE": str(models.base(tmp_path / "a base")), "INIT_FLAGS": "--rule opcm --scale 0.5"}
    assert healthy(place) == 1
    with running(place, tmp_path / "log") as process:
        assert healthy(place) == 0
        process.send_signal(signal.SIGTERM)  # heard by the daemon: it is the same process
        assert process.wait(services.LIMIT) == 0
    with State.open(Path(place["CONTINUAL_STATE"])) as state:
        assert state.format.rule == "opcm"
    again = start(place | {"INIT_BASE": "/nowhere", "CONTINUAL_KEEP": "0"}, "run")
    assert (again.returncode, "KEEP" in again.stderr, "nowhere" in again.stderr) == (2, True, False), again.stderr


def test_what_keeps_a_state_from_being_made_is_said(tmp_path: Path, place: dict[str, str]) -> None:
    told = start(place, "run")
    assert (told.returncode, "set INIT_BASE" in told.stderr) == (2, True)
    told = start(place | {"INIT_BASE": str(tmp_path / "nothing")}, "run")
    assert (told.returncode, "nothing" in told.stderr) == (2, True), told.stderr
    if os.geteuid() == 0:
        Path(place["CONTINUAL_STATE"]).mkdir(exist_ok=True)
        told = start(place | {"INIT_BASE": "/base"}, "run", user=10001)
        assert (told.returncode, "cannot be written by user 10001" in told.stderr) == (2, True), told.stderr


def test_other_words_are_commands_of_continual(place: dict[str, str]) -> None:
    told = start(place, "--version")
    assert (told.returncode, told.stdout.startswith("continual ")) == (0, True)
