"""No command ends with a traceback, whatever the environment is: one line, and an exit code that the page names."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from continual import api, making
from continual.cli import ending
from tests.helpers import models
from tests.helpers.command import Done, run
from tests.helpers.pages import DOCS
from tests.helpers.preloaded import Process

pytestmark = pytest.mark.slow

STATE = (
    ("status",),
    ("log",),
    ("show", "0"),
    ("tag", "x"),
    ("rollback", "0", "--yes"),
    ("rollback", "0", "--dry-run"),
    ("retry", "x"),
    ("verify",),
    ("scale", "norm:1"),
    ("unfold", "x", "--yes"),
    ("combine", "{tmp}/other"),
    ("tune", "--command", "true"),
    ("pool",),
    ("pool", "why", "x"),
    ("pool", "round"),
    ("watch", "--once", "--watch", "{tmp}/in"),
    ("release",),
    ("pause",),
    ("resume",),
    ("fold", "{tmp}/ft-0"),
    ("plan", "{tmp}/ft-0"),
    ("export", "{tmp}/out"),
    ("init", "{tmp}/base"),
    ("repair", "--yes"),
    ("backup", "{tmp}/backup"),
)
"""Every command that takes a state, but `run`, with arguments."""
WRITING = ("tag", "rollback", "scale", "unfold", "pause", "fold", "retry")
CODES = {int(code) for code in re.findall(r"^\| (\d+) \| ", (DOCS / "commands.md").read_text(), re.MULTILINE)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune that is folded and one that is not, and a state."""
    tmp = tmp_path_factory.mktemp("world")
    base = models.base(tmp / "base")
    (tmp / "in").mkdir()
    making.init(base, tmp / "state", making.Recipe("opcm"))
    models.fine_tune(base, tmp / "ft-0", 0)
    with api.open(tmp / "state", write=True) as merge:
        merge.fold(models.fine_tune(base, tmp / "x", 1))
    return tmp


@pytest.fixture
def tmp(world: Path, tmp_path: Path) -> Path:
    """The same, for a test that may change it."""
    shutil.copytree(world, tmp_path / "w")
    return tmp_path / "w"


def words(command: tuple[str, ...], tmp: Path) -> list[str]:
    return [word.replace("{tmp}", str(tmp)) for word in command]


def ended(done: Done, *codes: int) -> None:
    """One line at most beside what a command says of its work, no traceback, and a documented code."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (codes or CODES - {70}), done
    assert done.returncode != 70, done.stderr
    assert len(re.findall(r"^continual: ", done.stderr, re.MULTILINE)) <= 1, done.stderr
    assert done.stderr.isprintable() or done.stderr.replace("\n", "").isprintable()


def places(tmp: Path) -> Iterator[str]:
    """Paths that are no directory of a state."""
    os.mkfifo(tmp / "fifo")
    (tmp / "file").write_text("x")
    (tmp / "loop").symlink_to(tmp / "loop")
    (tmp / "empty").mkdir()
    yield from (f"{tmp}/{name}" for name in ("fifo", "file", "loop", "file/below", "n" * 5000, "\udcff\x1b[31m", "é/…"))
    yield "/proc/nowhere"


def test_every_command_on_what_is_no_state(world: Path, tmp_path: Path) -> None:
    for place in places(tmp_path):
        for command in STATE:
            if command[0] == "init" and place.endswith(("\x1b[31m", "…")):
                continue  # a fine place for a state
            ended(run(*words(command, world), "--state", place), 2, 3, 4)


def test_every_command_on_a_wrong_settings_file(world: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "deep").write_text("keep = " + "[" * 50_000)
    (tmp_path / "digits").write_text("keep = " + "9" * 10_000)
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    (tmp_path / "directory").mkdir()
    for turn, file in enumerate(("fifo", "bytes", "deep", "digits", "large", "directory", "nowhere", "n" * 5000)):
        for command in STATE[turn % 4 :: 4]:
            ended(run(*words(command, world), "--state", world / "state", "--config", tmp_path / file), 2)
    (tmp_path / "nothing").write_text("")
    assert run("log", "--state", world / "state", "--config", tmp_path / "nothing").returncode == 0


@contextlib.contextmanager
def broken(number: int) -> Iterator[None]:
    """Every file that is opened for writing, and every directory that is made, fails."""
    real = os.open

    def fails(path: object, flags: int, *more: int, **named: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *more, **named)  # type: ignore[call-overload, no-any-return]

    with mock.patch.object(os, "open", fails):
        yield


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EDQUOT])
def test_every_command_where_nothing_can_be_written(tmp: Path, number: int) -> None:
    for command in STATE:
        with broken(number):
            done = run(*words(command, tmp), "--state", tmp / "state")
        ended(done)
        if command[0] in WRITING and "--dry-run" not in command:
            assert done.returncode in (2, 3, 4), (command, done)
    assert run("verify", "--state", tmp / "state").returncode == 0


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), RecursionError("deep"), ZeroDivisionError("x")])
def test_what_ends_a_command_from_within_is_one_line(world: Path, error: BaseException, tmp_path: Path) -> None:
    expected = {MemoryError: 3, KeyboardInterrupt: 130}.get(type(error), 70)
    with (
        mock.patch("continual.cli.opened.records", side_effect=error),
        mock.patch.dict(os.environ, {"TMPDIR": str(tmp_path)}),
        mock.patch("tempfile.tempdir", None),
    ):
        done = run("log", "--state", world / "state")
        assert (done.returncode, len(done.stderr.splitlines())) == (expected, 1), done.stderr
        traced = run("--debug", "log", "--state", world / "state").stderr
        assert "Traceback" in traced or expected == 130  # typer keeps no trace of an interrupt
    kept = [file.read_text() for file in tmp_path.glob("continual-bug-*.txt")]
    assert ["Traceback" in text for text in kept] == [True] * (expected == 70)


def test_names_that_a_terminal_would_not_show_are_printed_as_escapes(world: Path) -> None:
    done = run("retry", "\x1b[31m\u202ered\udcff", "--state", world / "state")
    assert done.returncode == 2
    assert done.stderr.rstrip("\n").isprintable()


def test_what_destroys_does_nothing_where_nobody_can_be_asked(tmp: Path) -> None:
    before = run("log", "--state", tmp / "state").stdout
    done = run("rollback", "0", "--state", tmp / "state")
    assert (done.returncode, "--yes" in done.stderr) == (2, True)
    models.fine_tune(tmp / "base", tmp / "y", 2)
    assert run("fold", tmp / "y", "--state", tmp / "state").returncode == 0
    after = run("log", "--state", tmp / "state").stdout
    assert after.startswith(before[:20])
    done = run("unfold", "x", "--state", tmp / "state")
    assert (done.returncode, "--yes" in done.stderr) == (2, True)
    assert run("log", "--state", tmp / "state").stdout == after


@pytest.mark.slow
def test_standard_streams_that_are_full_closed_or_left(world: Path, tmp_path: Path) -> None:
    program = f"{sys.executable} -m continual log --state {world / 'state'}"
    for line in (f"{program} >&-", f"TERM=dumb LC_ALL=C PYTHONIOENCODING=ascii {program} 2>&- <&-"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), line
    left, onto = os.pipe()
    os.close(left)
    full = os.open("/dev/full", os.O_WRONLY)
    for stdout, code, said in ((full, 3, "No space left"), (onto, ending.CLOSED, "")):
        with (tmp_path / "said").open("w+") as stderr:
            with Process("rules", "--json", stdout=stdout, stderr=stderr.fileno()) as running:
                assert running.wait() == code
            stderr.seek(0)
            told = stderr.read()
        assert (said in told, "Traceback" in told, "Exception" in told) == (True, False, False), told
        os.close(stdout)
