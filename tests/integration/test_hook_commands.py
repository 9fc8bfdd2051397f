"""Hooks that run a command, with real commands."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from continual import config
from continual.config import HookSettings
from continual.publish import hooks
from continual.publish.hooks import call
from continual.publish.published import Published
from tests.helpers.hooks import STATE, Waits, published, tell


def python(code: str, *arguments: str, **more: Any) -> HookSettings:
    return HookSettings(kind="command", command=(sys.executable, "-c", code, *arguments), **more)


def test_a_command_gets_arguments_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hooks.SECRETS:
        monkeypatch.setenv(name, "hf_s3cret")
    monkeypatch.setenv("CONTINUAL_ANY_TOKEN", "s3cret")
    monkeypatch.setenv("MERGED", "whsec_s3cret")
    monkeypatch.setenv("KEPT", "yes")
    code = (
        "import json, os, sys; sys.stdin.read(); "
        "json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['PUBLISHED_DIRECTORY'], 'w')); print('copied\\n')"
    )
    given = (
        "{directory}",
        "x={lora}:{seq}",
        '{"a": {}, "{b}": "{state}"}',
        "{repo}@{commit} {url} {tag}",
        "{Seq}{seq!r}",
        "$KEPT;",
    )
    told = tell(python(code, *given), published(tmp_path))
    assert (told.ok, told.attempts, told.message, told.target) == (True, 1, "exit status 0: copied", sys.executable)
    arguments, environment = json.loads((tmp_path / "current-7").read_text())
    assert arguments == [
        str(tmp_path / "current-7"),
        f"x={tmp_path}/lora-7:7",
        f'{{"a": {{}}, "{{b}}": "{STATE}"}}',
        "org/merge@c0ffee https://hub/org/merge record-7",
        "{Seq}{seq!r}",
        "$KEPT;",
    ]
    assert environment["KEPT"] == "yes"
    assert environment["PUBLISHED_SEQ"] == "7"
    assert environment["PUBLISHED_LORA"] == str(tmp_path / "lora-7")
    assert not [name for name, value in environment.items() if name in hooks.SECRETS or "s3cret" in value]
    config.load(
        {}, environ={name: value for name, value in environment.items() if name != "CONTINUAL_CONFIG"}
    )  # it can run `continual`


def test_what_is_put_into_an_argument_is_not_filled_in_itself() -> None:
    told = tell(
        python("import sys; print(sys.argv[1:])", "{directory}", "{lora}"),
        Published(STATE, 7, directory=Path("/{seq}")),
    )
    assert told.message == "exit status 0: ['/{seq}', '']"


def test_a_command_that_fails_is_tried_again() -> None:
    code = "import sys; print('one', flush=True); print('t\\033[1mwo\\u2028\\n\\n', file=sys.stderr); sys.exit(3)"
    waits = Waits()
    told = tell(python(code, tries=2), Published(STATE, 7), waits)
    assert (told.ok, told.attempts, waits.seconds) == (False, 2, [1.0])
    assert told.message == "exit status 3: t [1mwo"


def test_a_command_that_says_much() -> None:
    told = tell(python("print('x' * 500_000); print('y' * 500_000)", tries=1), Published(STATE, 7))
    assert told.ok
    assert told.message.startswith("exit status 0: yyy")
    assert len(told.message) == 300


def test_a_command_that_is_killed() -> None:
    told = tell(python("import os; os.kill(os.getpid(), 9)", tries=1), Published(STATE, 7))
    assert (told.ok, told.message) == (False, "killed by signal 9")


@pytest.mark.parametrize("mode", [None, 0o644])
def test_a_program_that_cannot_be_run_is_not_tried_again(tmp_path: Path, mode: int | None) -> None:
    program = tmp_path / "deploy"
    if mode is not None:
        program.write_text("#!/bin/sh\n")
        program.chmod(mode)
    told = tell(HookSettings(kind="command", command=(str(program), "--token", "s3cret"), tries=5), Published(STATE, 7))
    assert (told.ok, told.attempts, told.target) == (False, 1, str(program))
    assert told.message in ("cannot be run: No such file or directory", "cannot be run: Permission denied")


def gone(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        )  # whoever adopts it may be slow to reap it
    except FileNotFoundError:
        return True


def test_a_time_out_ends_what_a_command_started(tmp_path: Path) -> None:
    """It is tried until the shell came so far as to say who it is and whom it started, on a busy machine more than
    once."""
    pids = tmp_path / "pids"
    command = ("/bin/sh", "-c", 'sleep 60 & echo begun; echo $$ $! > "$1"; wait', "sh", str(pids))
    hook = HookSettings(kind="command", command=command, timeout=0.3, tries=99)
    told = call(
        hook, Published(STATE, 7), threading.Event(), lambda _seconds: pids.exists() and pids.read_text().endswith("\n")
    )
    assert (told.ok, told.message) == (False, "not done after 0.3 s, ended: begun")
    assert told.seconds >= 0.3
    shell, child = (int(pid) for pid in pids.read_text().split())
    assert gone(shell)
    end = time.monotonic() + 5
    while not gone(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_command_leaves_running_holds_up_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    hook = HookSettings(
        kind="command",
        command=("/bin/sh", "-c", 'sleep 60 & echo $! > "$1"; echo started', "sh", str(pids)),
        timeout=30,
    )
    told = tell(hook, Published(STATE, 7))
    assert (told.ok, told.message) == (True, "exit status 0: started")
    assert told.seconds < 10
    child = int(pids.read_text())
    assert not gone(child)
    os.kill(child, 9)
