"""What a reader does whose generation expired after it opened the state: it reads what was committed since."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from continual.errors import Misconfigured
from continual.state import opening
from continual.state.store import State

_LOOKS = 20
"""How often the log is read again because what was to be read has expired."""


@contextlib.contextmanager
def newest(state: State) -> Iterator[None]:
    """Keeps the generation of the newest record from expiring while the block runs. Where it has expired since `state`
    was opened for reading, the log is read again first, and `state` is at the record that is the newest then. Raises as
    `State.open` does.

    What a writer has in force never expires, so its log is not read again.
    """
    with contextlib.ExitStack() as lease:
        for left in reversed(range(_LOOKS)):
            try:
                lease.enter_context(state.lease())
                break
            except Misconfigured:
                if not left:
                    raise
                state.ledger, state.acknowledged = opening.load(state.path, *opening.read_format(state.path))
        yield
