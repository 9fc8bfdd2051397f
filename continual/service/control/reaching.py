"""The command's end of the control socket."""

from __future__ import annotations

import contextlib
import json
import socket

from continual.errors import Abandoned, Retry
from continual.service.control import parley
from continual.service.control.parley import Hearing
from continual.service.control.requests import Request
from continual.stores import Where, here
from continual.texts import Json

PATIENCE = 10.0
"""Seconds in which a daemon says that it has heard, and in which it gives up what it does."""
LONGEST = 1 << 28
"""Bytes of a line of an answer."""
_SEE = "'continual log' says what became of it"


class Reached:
    """A connection to the daemon on a state. A context manager."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = sock.makefile("rb")

    def __enter__(self) -> Reached:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._sock.close()

    def ask(self, request: Request, hear: Hearing) -> dict[str, Json]:
        """Has the daemon do what `request` asks for, and returns its answer. An interrupt has it give up what it does,
        as far as that is not done already; a second one leaves it alone.

        Raises the error that the daemon met, Retry where it ends or does not answer, KeyboardInterrupt.
        """
        try:
            self._sock.settimeout(PATIENCE)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why before
                self._sock.sendall(request.model_dump_json().encode() + b"\n")
            heard = self._line()
            if heard.get("heard"):
                hear.note(f"the daemon does this after what it does now: {heard['heard']}")
            self._sock.settimeout(None)
            return self._answer(heard, hear)
        except KeyboardInterrupt:
            return self._given_up(hear)
        except TimeoutError:
            raise Retry(f"the daemon does not answer within {PATIENCE:.0f} s; {_SEE}") from None
        except OSError as error:
            raise Retry(f"the daemon cannot be talked to ({error.strerror}); {_SEE}") from None

    def _given_up(self, hear: Hearing) -> dict[str, Json]:
        """Tells the daemon that nobody wants it any more, and hears what came of it. Raises as `ask` does."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.settimeout(PATIENCE)
            return self._answer({}, hear)
        except (Abandoned, OSError, Retry):
            hear.note(f"interrupted: the daemon gives it up at the next tensor, unless it is done; {_SEE}")
            raise KeyboardInterrupt from None

    def _answer(self, line: dict[str, Json], hear: Hearing) -> dict[str, Json]:
        while True:
            progress, note, answer, error = (line.get(key) for key in ("progress", "note", "answer", "error"))
            if isinstance(answer, dict):
                return answer
            if isinstance(error, dict):
                raise parley.error_of(error)
            if isinstance(note, str):
                hear.note(note)
            if isinstance(progress, list) and len(progress) == 3:
                stage, done, total = progress
                if isinstance(done, int) and isinstance(total, int):
                    hear.progress(str(stage), done, total)
            line = self._line()

    def _line(self) -> dict[str, Json]:
        """The next line. Raises Retry where there is none."""
        text = self._lines.readline(LONGEST)
        if not text.endswith(b"\n"):
            raise Retry(f"the daemon ended before it answered; {_SEE}")
        body: Json = json.loads(text)
        assert isinstance(body, dict)
        return body


def reach(state: Where) -> Reached | None:
    """The daemon on the state in `state`; None where none answers."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    try:
        with parley.address(here(state)) as path:
            sock.connect(path)
    except OSError:  # no state, no socket, one of a killed daemon, or one of another user
        sock.close()
        return None
    return Reached(sock)
