"""Commands beside a running daemon: the same output and exit codes as alone, between its folds; and what the socket
takes from clumsy hands."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from continual import api, making
from continual.cli import console
from continual.errors import Retry
from continual.service.control import parley
from continual.service.control.answering import Control
from continual.state import State
from continual.state.verify import verify
from tests.helpers import models
from tests.helpers.command import Done, machine, run
from tests.helpers.services import LIMIT, daemon, get, status, until, url

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """A state of a rule that can only fold again, with three folds in it, and a watched folder that is empty."""
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state", making.Recipe("opcm"))
    (tmp_path / "in").mkdir()
    with api.open(tmp_path / "state", write=True) as merge:
        for number in range(3):
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{number}", number))
    return tmp_path / "state", tmp_path / "in"


def names(state: Path) -> list[str]:
    with State.open(state) as opened:
        return [commit.entry.candidate.name for commit in opened.ledger.folds()]


def even(done: Done, state: Path) -> Done:
    """What was printed, without what differs from one run to the next: times, names of generations, checksums."""

    def of(text: str) -> str:
        text = text.replace(str(state), "STATE")
        text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
        text = re.sub(r"in \d+\.\d s", "in N s", text)
        return re.sub(r'"(generation|crc|prev)": "?\w+"?|\b[0-9a-f]{16}\b', "ID", text)

    return Done(done.returncode, of(done.stdout), of(done.stderr))


LINES = (
    ("tag", "first", "--at", "1"),
    ("tag", "first", "--at", "2"),
    ("tag", "first", "--at", "2", "--force"),
    ("tag", "not a name"),
    ("tag", "second", "--at", "99"),
    ("scale", "norm:2", "--lines", "0.5:0.5"),
    ("scale", "loud"),
    ("unfold", "ft-1", "--dry-run"),
    ("unfold", "ft-1"),
    ("unfold", "ft-1", "--yes"),
    ("unfold", "ft-1", "--yes"),
    ("retry", "nobody"),
    ("retry", "ft-1"),
    ("rollback", "1", "--dry-run"),
    ("unfold", "ft-0", "--yes", "--json"),
    ("rollback", "1"),
    ("rollback", "99", "--yes"),
    ("rollback", "1", "--yes"),
    ("pool", "round"),
    ("release",),
    ("pause",),
    ("pause", "--json"),
    ("resume", "--json"),
    ("resume",),
    ("retry", "2", "--json"),
    ("rollback", "1", "--json"),
    ("rollback", "1", "--yes", "--json"),
    ("tag", "third", "--json"),
    ("scale", "auto", "--json"),
    ("unfold", "ft-0", "--dry-run", "--json"),
    ("unfold", "ft-0", "--json"),
    ("unfold", "ft-0", "--yes", "--json"),
)


def test_every_command_does_the_same_beside_a_daemon_as_alone(place: tuple[Path, Path]) -> None:
    state, watch = place
    alone = state.parent / "alone"
    shutil.copytree(state, alone)
    with daemon(state, watch) as process:
        url(process, state)
        until((state / parley.NAME).exists, "the socket is there")
        assert stat.S_IMODE((state / parley.NAME).stat().st_mode) == 0o600
        for words in LINES:
            beside = even(run(*words, "--state", state), state)
            assert beside == even(run(*words, "--state", alone), alone), words
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    assert not (state / parley.NAME).exists()
    kinds = [[c.entry.kind for c in opened.ledger.log] for opened in map(State.open, (state, alone))]
    assert kinds[0] == kinds[1]
    with State.open(state) as opened:
        assert verify(opened) == []


def test_what_is_asked_at_a_terminal_does_not_get_into_the_json(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = place
    monkeypatch.setattr(console, "must_be_asked", lambda _what: None)
    for answer, code in (("n", 1), ("y", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
        done = run("rollback", 1, "--json", "--state", state)
        assert (done.returncode, "2 folds would be undone. Go back?" in done.stderr) == (code, True), done.stderr
        assert json.loads(done.stdout.strip() or "{}").get("to") == (1 if code == 0 else None)


def test_an_error_of_the_disk_is_no_bug_of_the_daemon() -> None:
    body = parley.error_body(OSError(errno.EIO, os.strerror(errno.EIO), "/state/leases"))
    assert isinstance(error := parley.error_of(body), Retry)
    assert str(error).startswith("/state/leases: the disk cannot read")


def test_a_pause_holds_through_a_restart_and_a_retried_model_is_folded_at_once(place: tuple[Path, Path]) -> None:
    state, watch = place
    base = state.parent / "base"
    models.fine_tune(base, watch / "alice", 11)
    with daemon(state, watch) as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 4, "alice is folded")
        assert run("pause", "--state", state).returncode == 0
        models.fine_tune(base, watch / "bob", 12)
        until(lambda: any(row["model"] == "bob" for row in status(address)["queue"]), "bob waits")
        told = status(address)
        assert (told["health"], told["folds"], "continual resume" in told["why"]) == ("paused", 4, True)
        assert "continual_paused 1.0" in get(f"{address}/metrics")[1]
        assert get(f"{address}/healthz")[0] == get(f"{address}/readyz")[0] == 200
        assert run("status", "--state", state).stdout.startswith("paused: ")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "folding is paused since" in run("status", "--state", state).stdout
    with daemon(state, watch) as process:  # in the place of the socket that the kill left
        address = url(process, state)
        until(lambda: any(row["model"] == "bob" for row in status(address)["queue"]), "bob waits again")
        assert status(address)["health"] == "paused"
        assert run("rollback", 0, "--yes", "--state", state).returncode == 0
        assert status(address)["folds"] == 0
        assert run("resume", "--state", state).returncode == 0
        until(lambda: status(address)["folds"] == 1, "bob is folded")
        assert run("retry", "alice", "--state", state).returncode == 0
        until(lambda: status(address)["folds"] == 2, "alice is folded again, though nothing of her files has changed")
    assert names(state) == ["bob", "alice"]


def test_flags_that_would_change_nothing_are_refused_beside_a_daemon(place: tuple[Path, Path]) -> None:
    state, watch = place
    with daemon(state, watch) as process:
        url(process, state)
        until((state / parley.NAME).exists, "the socket is there")
        for words in (("unfold", "ft-1", "--keep", "2"), ("pool", "round", "--select", "relevance")):
            done = run(*words, "--state", state)
            assert (done.returncode, "settings of its own" in done.stderr) == (2, True), done.stderr
        assert run("combine", state.parent / "other", "--state", state).returncode == 5
    assert names(state) == ["ft-0", "ft-1", "ft-2"]


def test_ctrl_c_gives_up_what_the_daemon_does_and_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (768, 768) for i in range(6)}
    base = models.base(tmp_path / "base", shapes=shapes)
    state = tmp_path / "state"
    (tmp_path / "in").mkdir()
    making.init(base, state, making.Recipe("opcm"))
    with api.open(state, write=True, keep=1) as merge:
        for number in range(2):
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{number}", number))
    before = machine("log", "--state", state)
    with daemon(state, tmp_path / "in", "--workers", "1") as process, connected(state) as sock:
        address = url(process, state)
        sock.sendall(b'{"command":"unfold","model":"ft-0"}\n')
        until(lambda: (status(address)["current"] or {}).get("stage") == "fold", "it folds again")
        assert status(address)["current"]["model"] == "the command unfold"
        sock.shutdown(socket.SHUT_WR)  # what the command does on an interrupt
        last = json.loads(sock.makefile("rb").readlines()[-1])
        assert last["error"]["kind"] == "Abandoned"
        assert status(address)["health"] == "ok"
        assert [r["seq"] for r in machine("log", "--state", state)] == [r["seq"] for r in before]
        assert run("tag", "fine", "--state", state).returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    with State.open(state, write=True) as opened:
        assert verify(opened) == []


@contextlib.contextmanager
def connected(state: Path) -> Iterator[socket.socket]:
    """A connection to the control socket."""

    def connect() -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(LIMIT)
        try:
            with parley.address(state) as path:
                sock.connect(path)
        except OSError:
            sock.close()
            return None
        return sock

    with contextlib.closing(until(connect, "the socket is there")) as sock:
        yield sock


HOSTILE: dict[str, Callable[[socket.socket], None]] = {
    "garbage": lambda sock: sock.sendall(b"\x00\xff{[[" + b"\n"),
    "deep": lambda sock: sock.sendall(b'{"command":' + b"[" * 60_000 + b"\n"),
    "unknown": lambda sock: sock.sendall(b'{"command":"explode"}\n'),
    "another type": lambda sock: sock.sendall(b'{"command":"rollback","seq":[1]}\n'),
    "huge number": lambda sock: sock.sendall(b'{"command":"rollback","seq":' + b"9" * 5000 + b"}\n"),
    "endless": lambda sock: sock.sendall(b"a" * 200_000),
    "half a line": lambda sock: sock.sendall(b'{"command":"tag"'),
    "a line, and then more": lambda sock: sock.sendall(b'{"command":"pause"}\n' + b"x" * 50_000),
    "nothing": lambda sock: sock.shutdown(socket.SHUT_WR),
}


def test_nothing_that_is_sent_or_not_sent_ends_the_daemon(place: tuple[Path, Path]) -> None:
    state, watch = place
    with daemon(state, watch) as process, contextlib.ExitStack() as held:
        address = url(process, state)
        for _ in range(60):  # more than are taken; they say nothing
            held.enter_context(connected(state))
        began = time.monotonic()
        assert get(f"{address}/healthz")[0] == 200
        assert time.monotonic() - began < 5
        refused = run("scale", "norm:1", "--state", state)
        assert (refused.returncode, "daemon already" in refused.stderr) == (3, True), refused.stderr
        held.close()
        until(lambda: run("scale", "norm:1", "--state", state).returncode == 0, "the others are gone")
        for send in HOSTILE.values():
            with connected(state) as sock, contextlib.suppress(OSError):
                send(sock)
        models.fine_tune(state.parent / "base", watch / "alice", 11)
        run("resume", "--state", state)  # one of the above is a request to pause
        until(lambda: status(address)["folds"] == 4, "it goes on folding")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0


def test_a_daemon_that_ends_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    """On an object store who lost its lease may end after the next one has begun."""

    async def both() -> bool:
        ends = [asyncio.Event(), asyncio.Event()]
        serving = []
        for end in ends:
            control = Control(tmp_path, _performs_nothing, lambda: None)
            serving.append(asyncio.create_task(control.serve(end)))
            await asyncio.sleep(0)
            assert (tmp_path / parley.NAME).is_socket()
        ends[0].set()
        await serving[0]
        left = (tmp_path / parley.NAME).is_socket()
        ends[1].set()
        await serving[1]
        return left and not (tmp_path / parley.NAME).exists()

    assert asyncio.run(both())


async def _performs_nothing(*_: object) -> dict[str, object]:
    return {}


def test_a_state_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    base = models.base(tmp_path / "base")
    making.init(base, deep / "state")
    (tmp_path / "in").mkdir()
    with daemon(deep / "state", tmp_path / "in") as process:
        url(process, deep / "state")
        until((deep / "state" / parley.NAME).exists, "the socket is there")
        assert machine("tag", "zero", "--state", deep / "state") == {"zero": 0}
        assert sorted(os.listdir(deep)) == ["daemon.log", "state"]


def test_a_file_in_the_place_of_the_socket_is_left_alone_and_the_daemon_runs(place: tuple[Path, Path]) -> None:
    state, watch = place
    (state / parley.NAME).write_text("mine")
    models.fine_tune(state.parent / "base", watch / "alice", 11)
    with daemon(state, watch) as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 4, "alice is folded")
        assert run("tag", "x", "--state", state).returncode == 5
    assert (state / parley.NAME).read_text() == "mine"
    assert "no control socket" in (state.parent / "daemon.log").read_text()
