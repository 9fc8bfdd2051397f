"""`continual ARGUMENTS`, in this process, where what is imported already need not be again; and in one of its own,
where that is what a test is about."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import pytest
import typer.main

from continual.cli.main import main
from continual.hub import Hub
from tests.helpers.preloaded import Process

parsers = functools.cache(typer.main.get_command)
"""What parses the commands is made once: that takes longer than most commands, and no command changes it."""


class Done(NamedTuple):
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, env: dict[str, str] | None = None, client: Hub | None = None) -> Done:
    """The command without a terminal, asking `client` where it asks the Hub. Not for `continual run`, which sets up
    logging for the whole process."""
    out, err = io.StringIO(), io.StringIO()
    stop = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", ["continual", *(str(a) for a in arguments)]),
        mock.patch.dict(os.environ, env or {}),
        mock.patch.object(typer.main, "get_command", parsers),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            with pytest.raises(SystemExit) as left:
                main(client)
        finally:
            signal.signal(signal.SIGTERM, stop)
    code = left.value.code
    return Done(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def machine(*arguments: object, code: int = 0, env: dict[str, str] | None = None, client: Hub | None = None) -> Any:
    """The JSON a command prints."""
    done = run(*arguments, "--json", env=env, client=client)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def process(*arguments: object, env: dict[str, str] | None = None) -> Done:
    """The same in a process of its own."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with Process(
            *arguments, stdout=out.fileno(), stderr=err.fileno(), environment={**os.environ, **(env or {})}
        ) as running:
            code = running.wait()
        out.seek(0)
        err.seek(0)
        return Done(code, out.read(), err.read())
