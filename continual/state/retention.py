"""Which generations are kept, and for how long: leases of readers, what a record names, what expires. Only whole
directories of generations are deleted; a record never is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from continual.state import canaries, holding, storing
from continual.state.durable import environment, trouble
from continual.state.ledger import Ledger
from continual.state.names import EXPIRED
from continual.stores import Where

_log = logging.getLogger("continual.state")


def kept(path: Where, ledger: Ledger) -> list[str]:
    """The generations of the state in `path` that are on disk and named by a record, in order of their names."""
    return [name for name in standing(path) if name in ledger.generations]


def standing(path: Where) -> list[str]:
    """The directories below `generations/` that do not expire just now, in order of their names. Raises OSError."""
    found = _listed(path)
    marked = {name.removeprefix(EXPIRED) for name in found if name.startswith(EXPIRED)}
    return [name for name in found if not name.startswith(".") and name not in marked]


def unnamed(path: Where, ledger: Ledger) -> list[str]:
    """The directories below `generations/` that no record names: orphans, and what is being deleted."""
    return [name for name in _listed(path) if name not in ledger.generations]


def dead(path: Where, ledger: Ledger) -> list[str]:
    """Those of `unnamed` that nobody writes any more. Raises OSError."""
    return list(holding.of(path).unwritten(path, unnamed(path, ledger)))


def orphans(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `unnamed` that a writer left which died before its commit."""
    return tuple(name for name in names if not name.startswith(EXPIRED))


class Keep(NamedTuple):
    """How many of the newest generations are kept, and how many bytes they may take on the disk (None: any number). A
    file that several of them share counts once."""

    most: int
    nbytes: int | None = None


def expired(path: Where, ledger: Ledger, keep: Keep, *, then: str | None = None) -> list[str]:
    """The generations on disk that may go: not the one in force, none of the newest as `keep` says, none that a tag
    names or a canary needs, none that a living reader has leased. `then`: as it will be once that generation is put
    in force again. Raises OSError."""
    again = [] if then is None else [then]
    newest = [*again, *islice((g for g in reversed(ledger.generations) if g != then), keep.most)][: keep.most]
    if keep.nbytes is not None:
        newest = _within(path, newest, keep.nbytes)
    held = {*newest, *_needed(path, ledger, then)}
    found = [name for name in kept(path, ledger) if name not in held]
    leased = holding.of(path).leased(path, found)
    return [name for name in found if name not in leased]


def _needed(path: Where, ledger: Ledger, then: str | None = None) -> set[str]:
    """The generations that have to be there: the one in force, or that will be, those with a tag and those of canaries.
    Raises OSError."""
    named = [*ledger.tags.values(), *(seq for seq in canaries.held(path) if seq <= ledger.head.seq)]
    return {name for name in (then or ledger.head.generation, *(ledger.get(seq).generation for seq in named)) if name}


def _within(path: Where, newest: list[str], nbytes: int) -> list[str]:
    """As many of the newest, in this order, as take `nbytes` on the disk together."""
    seen, total = set[int](), 0
    for place, name in enumerate(newest):
        total += taken(path, name, seen)
        if total > nbytes:
            return newest[:place]
    return newest


def taken(path: Where, name: str, seen: set[int]) -> int:
    """Bytes that a generation takes; files whose inodes are in `seen` count as nothing, and those that are counted are
    added to it."""
    return sum(storing.taken(path / "generations" / name, seen).values())


def expire(path: Where, ledger: Ledger, keep: Keep, may: Callable[[], None]) -> list[str]:
    """Deletes the generations that `expired` names and returns them. What cannot be deleted now is tried again the next
    time, and the log has a line about it. `may` is asked before each, and raises Halt where another process may have
    put it in force by now. Raises Halt if an fsync failed, too."""
    gone: list[str] = []
    try:
        gone.extend(_marked(path, expired(path, ledger, keep), may))
        marks = [name for name in _listed(path) if name.startswith(EXPIRED)]
        needed = _needed(path, ledger) if marks else set()
        for name in marks:
            holding.of(path).delete(path, name, needed)
    except OSError as error:
        _log.warning("%s: old generations stay until the next fold: %s", path, trouble(error))
    return gone


def drop(path: Where, names: Iterable[str]) -> None:
    """Deletes generations of the copy of a state, but those that a reader has leased. Raises OSError and Halt."""
    for name in list(_marked(path, names, lambda: None)):
        holding.of(path).delete(path, f"{EXPIRED}{name}", ())


def _marked(path: Where, names: Iterable[str], may: Callable[[], None]) -> Iterator[str]:
    """Marks generations that no reader has leased as expired, and yields their names."""
    for name in names:
        if holding.of(path).mark(path, name, may):
            yield name


def clear(path: Where, ledger: Ledger, names: Iterable[str]) -> None:
    """Deletes what `unnamed` found. What cannot be deleted now is found again at the next open."""
    with contextlib.suppress(OSError):
        needed = _needed(path, ledger)
        for name in names:
            with contextlib.suppress(OSError):
                holding.of(path).delete(path, name, needed)


@contextlib.contextmanager
def lease(path: Where, generation: str) -> Iterator[None]:
    """Keeps `generation` of the state in `path` from expiring while the block runs, if it has not yet: that is for the
    block to look at. It needs no permission to write, but on an object store, where it is not kept without. Raises
    Retry where the disk gets in the way."""
    with contextlib.ExitStack() as held:
        with environment(f"cannot read the generation {generation}"):
            held.enter_context(holding.of(path).lease(path, generation))
        yield


def _listed(path: Where) -> list[str]:
    """The names below `generations/`; none where it is not there. Raises OSError."""
    return storing.names(path / "generations")
