"""The contract of who holds what of a state: its lock for writing, generations that somebody reads, and what may go. On
a disk the kernel knows who lives (disk_holds.py); on an object store whoever lives writes again and again
(bucket_holds.py). Who asks needs not know which.

A generation expires by being marked: from then on nobody begins to read it, and what is left of it may be deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, Protocol

from continual.state.bucket_holds import BucketHolds
from continual.state.disk_holds import DiskHolds
from continual.stores import ObjectPath, Where


class Lock(Protocol):
    """A lock that is held."""

    def tell(self, url: str | None) -> None:
        """Says that this process holds it, and where its daemon answers."""

    def must_hold(self) -> None:
        """Raises Halt where it is not held any more: then nothing may be committed."""

    def close(self) -> None:
        """Gives it back."""


class Holds(Protocol):
    """What is asked of either, of the state in `path`. All of it raises OSError."""

    def lock(self, path: Any) -> Lock:
        """Locks it for writing. Raises BlockingIOError where another process has it."""

    def said(self, path: Any) -> bytes:
        """What its lock says. Raises FileNotFoundError where there is none."""

    def is_locked(self, path: Any) -> bool:
        """Whether somebody has the lock that says so. It is not taken."""

    def lease(self, path: Any, generation: str) -> AbstractContextManager[None]:
        """Keeps a generation from being marked while the block runs, if it is not yet; `stands` says that."""

    def leased(self, path: Any, names: Sequence[str], /) -> Set[str]:
        """The generations, those of `names` among them, that living readers have leased."""

    def stands(self, generation: Any) -> bool:
        """Whether the directory of a generation is there, and not marked."""

    def mark(self, path: Any, name: str, may: Callable[[], None], /) -> bool:
        """Marks a generation as expired, for good, unless a reader has leased it; whether it did. `may` is asked, and
        raises Halt where another process may have put the generation in force by now."""

    def delete(self, path: Any, name: str, needed: Container[str], /) -> None:
        """Deletes a directory below `generations/`, and with a mark all that it is of, unless that is needed."""

    def unwritten(self, path: Any, names: Sequence[str], /) -> Sequence[str]:
        """Those of the directories below `generations/` that nobody writes, whatever was sent before."""


_DISK: Holds = DiskHolds()
_BUCKET: Holds = BucketHolds()


def of(path: Where) -> Holds:
    """Who is to be asked of a state there."""
    return _BUCKET if isinstance(path, ObjectPath) else _DISK
