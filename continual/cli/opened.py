"""What a command begins with: the settings from file, environment and flags, and the state that they name, opened; or
the daemon that has it open. Heavy imports happen when it is called."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

from continual.timing.clock import stage

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.cli.flags import Flags
    from continual.config import Settings
    from continual.service.control.parley import Hearing
    from continual.service.control.requests import Request
    from continual.state import State
    from continual.texts import Json


def settings(flags: Flags) -> Settings:
    """The settings of a command. Raises Misconfigured."""
    from continual.config import load

    return load(flags.settings, file=flags.config)


@contextlib.contextmanager
def merge(flags: Flags, *, write: bool = False) -> Iterator[Merge]:
    """The state that the settings name, opened for work on its tensors. Raises Misconfigured, Busy and Damaged."""
    with stage("open"):
        from continual import lazily
        from continual.api import Merge

        lazily.load()
        gc.freeze()  # half of the collector's time in a short command went into what was loaded just now
        found = Merge(settings(flags), write=write, client=flags.client)
    with found:
        yield found


@contextlib.contextmanager
def records(flags: Flags) -> Iterator[State]:
    """The state that the settings name, for a command that looks at its records alone: neither rules' figures nor
    anything else of the merge is loaded. Raises Misconfigured, Busy and Damaged."""
    from continual.engine.agreeing import agree
    from continual.state import State, opening

    asked = settings(flags)
    with opening.way_out():
        state = State.open(asked.state)
    with state:
        agree(state, asked)
        yield state


@contextlib.contextmanager
def looked(flags: Flags) -> Iterator[Merge]:
    """The same for a command that only looks at it, and at no tensor: torch is not loaded."""
    from continual.api import Merge

    with Merge(settings(flags), client=flags.client) as found:
        yield found


def seq_of(merge: Merge, word: str | None) -> int | None:
    """The number of the record that was typed: a number, a tag or HEAD; None where nothing was. Raises
    Misconfigured."""
    from continual.state.refs import must_be_named

    return None if word is None else must_be_named(merge.state.ledger, word)


def act(flags: Flags, request: Request, *, quiet: bool = False) -> dict[str, Json]:
    """Has `request` done: by the daemon that has the state open, between two folds, or here where none has. Returns the
    answer; lines for people go to standard error, unless `quiet`. Raises the same errors either way, Busy where another
    process has the state open and takes no requests."""
    from continual.cli import console
    from continual.errors import Busy
    from continual.service.control.parley import Hearing

    asked = settings(flags)

    def note(text: str) -> None:
        if not quiet:
            console.warn(text)

    with console.progress() as progress:
        hear = Hearing(progress, note)
        answer = by_daemon(flags, asked, request, hear)
        if answer is not None:
            return answer
        from continual.api import Merge
        from continual.service.control import acting

        try:
            with Merge(asked, write=request.writes, client=flags.client) as found:
                return acting.act(found, request, hear)
        except Busy:  # a daemon may have been starting
            answer = by_daemon(flags, asked, request, hear)
            if answer is None:
                raise
            return answer


def by_daemon(flags: Flags, asked: Settings, request: Request, hear: Hearing) -> dict[str, Json] | None:
    """What the daemon on the state answers; None where none takes requests. Raises Misconfigured for flags that would
    change nothing: the daemon has settings of its own."""
    from continual.errors import Misconfigured
    from continual.service.control import reaching

    daemon = reaching.reach(asked.state)
    if daemon is None:
        return None
    with daemon:
        typed = [name for name, value in flags.settings.items() if name != "state" and value not in (None, [])]
        if typed:
            raise Misconfigured(
                f"a daemon has {asked.state} open, and goes by settings of its own: leave out {', '.join(typed)}, "
                "or set it where the daemon reads it"
            )
        return daemon.ask(request, hear)
