"""Which generations are kept, and for how long: leases of readers, what a record names, what expires. Only whole
directories of generations are deleted; a record never is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from continual.state.durable import environment, move_away
from continual.state.ledger import Ledger

_EXPIRED = ".expired-"


def kept(path: Path, ledger: Ledger) -> list[str]:
    """The generations of the state in `path` that are on disk and named by a record, in order of their names."""
    named = _named(ledger)
    return [name for name in _on_disk(path) if name in named]


def unnamed(path: Path, ledger: Ledger) -> list[str]:
    """The directories below `generations/` that no record names: orphans, and what is being deleted."""
    named = _named(ledger)
    return [name for name in _on_disk(path) if name not in named]


def orphans(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `unnamed` that a writer left which died before its commit."""
    return tuple(name for name in names if not name.startswith(_EXPIRED))


def expired(path: Path, ledger: Ledger, keep: int, *, then: str | None = None) -> list[str]:
    """The generations on disk that may go: not the one in force, none of the newest `keep`, none that a tag names,
    none that a living reader has leased. `then`: as it will be once that generation is put in force again."""
    newest = list(dict.fromkeys(g for g in (then, *(c.generation for c in reversed(ledger.log))) if g))[:keep]
    tagged = {ledger.get(seq).generation for seq in ledger.tags.values()}
    held = {then or ledger.head.generation, *newest, *tagged, *leased(path / "leases")}
    return [name for name in kept(path, ledger) if name not in held]


def delete(path: Path, names: Iterable[str]) -> None:
    """Deletes generations of the state in `path`. Raises Retry if the disk gets in the way."""
    generations = path / "generations"
    with environment("cannot delete old generations"):
        for name in names:
            # renamed first: a kill while its files are deleted must not leave half of it under a name that a record
            # knows
            move_away(generations / name, generations / f"{_EXPIRED}{name}")
        for name in names:
            shutil.rmtree(generations / f"{_EXPIRED}{name}")


def clear(path: Path, names: Iterable[str]) -> None:
    """Deletes what `unnamed` found. What cannot be deleted now is found again at the next open."""
    for name in names:
        shutil.rmtree(path / "generations" / name, ignore_errors=True)


@contextlib.contextmanager
def lease(path: Path, generation: str) -> Iterator[None]:
    """Keeps `generation` of the state in `path` from expiring while the block runs. On a read-only file system it
    yields without: nothing expires there."""
    while True:
        file = path / "leases" / f"{generation}-{secrets.token_hex(4)}"
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError:
            yield
            return
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # the writer took it for a dead reader's between the two calls
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(fd)


def leased(directory: Path) -> Set[str]:
    """The generations that a living reader has leased, by the files in `directory`; removes those of dead readers."""
    found = set()
    for file in directory.iterdir():
        if file.name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
            except BlockingIOError:
                found.add(file.name.rpartition("-")[0])
            finally:
                os.close(fd)
    return found


def _named(ledger: Ledger) -> set[str]:
    return {commit.generation for commit in ledger.log if commit.generation}


def _on_disk(path: Path) -> list[str]:
    return sorted(directory.name for directory in (path / "generations").iterdir())
