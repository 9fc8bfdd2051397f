"""The contract of what a state lies on: put, create, get, list, delete, and what else a state needs, for a place on a
disk (disk.py) and for one on an object store (bucket.py). Nothing else in the code has to know which of them it is.

    put       replace               the old contents or the new, for every reader
    create    creating              one of those who race makes it; the others are told
    get       contents, some        all of it, or a range
    list      names, sizes          what stands directly below, or every file below
    delete    remove, remove_tree

What goes wrong is an OSError for either, and `Halt` where it is unknown what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from continual.state.bucket import Bucket
from continual.state.disk import Disk
from continual.stores import ObjectPath, Where

if TYPE_CHECKING:
    import zarr

Stem: TypeAlias = str | ObjectPath
"""A path on a disk as a text, or a place on an object store: either goes on by `+`."""
A = TypeVar("A")
B = TypeVar("B")


class Creating(Protocol):
    """A file that is about to be made, whose name must be free."""

    def make(self, may: Callable[[], None] = ...) -> None:
        """Has the file stand there. `may` is asked before every try, and raises Halt where it must not be made. Raises
        Retry where another was first, OSError where it does not stand there, Halt where that is unknown."""

    def sync(self) -> None:
        """Has its name survive a power cut. Raises Halt."""


class NewChunk(Protocol):
    """The file of a chunk being written. Not synced."""

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes."""

    def skip(self, count: int) -> None:
        """So many zeros are next."""

    def finish(self) -> None:
        """All is written."""

    def close(self) -> None:
        """Writes no more."""


class OldChunk(Protocol):
    """The file of a chunk being read."""

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""

    def read_into(self, into: memoryview, at: int) -> int:
        """Fills `into`, or its beginning, with the bytes from `at` on; returns how many there were, 0 at the end."""

    def read(self, count: int, at: int) -> bytes:
        """So many bytes from `at` on, or fewer where it ends before."""

    def close(self) -> None:
        """Reads no more."""


class _Medium(Protocol):
    """What is asked of both, as the functions below that have these names. `at_once`: requests that are worth being on
    their way at a time."""

    at_once: int

    def stem(self, path: Any) -> Stem: ...
    def below(self, root: Any, file: str) -> Stem: ...
    def replace(self, path: Any, data: bytes) -> None: ...
    def replace_unsynced(self, path: Any, data: bytes) -> None: ...
    def creating(self, path: Any, data: bytes, on_step: Callable[[str], None]) -> AbstractContextManager[Creating]: ...
    def write_new(self, path: Any, data: bytes) -> None: ...
    def contents(self, path: Any) -> bytes: ...
    def some(self, path: Any, start: int, stop: int) -> bytes: ...
    def size(self, path: Any) -> int: ...
    def clear_temporaries(self, path: Any) -> None: ...
    def names(self, path: Any) -> list[str]: ...
    def sizes(self, path: Any) -> dict[str, int]: ...
    def weight(self, path: Any) -> int: ...
    def taken(self, path: Any, seen: set[int], /) -> dict[str, int]: ...
    def unreadable(self, path: Any, names: Sequence[str], /) -> Iterator[Where]: ...
    def remove_tree(self, path: Any) -> None: ...
    def drop_tree(self, path: Any) -> None: ...
    def made(self, path: Any) -> Sequence[Where]: ...
    def directory(self, path: Any) -> None: ...
    def open_directory(self, path: Any) -> None: ...
    def appearing(self, final: Any, name: str, /) -> AbstractContextManager[Where]: ...
    def take(self, source: Any, target: Any) -> None: ...
    def rename(self, path: Any, target: Any) -> None: ...
    def sync(self, path: Any) -> None: ...
    def sync_all(self, paths: Sequence[Any]) -> None: ...
    def sync_tree(self, path: Any, between: Callable[[], None] | None, /) -> None: ...
    def free(self, path: Any) -> int | None: ...
    def block(self, path: Any, /) -> int: ...
    def new_chunk(self, path: Any, nbytes: int, /) -> NewChunk: ...
    def old_chunk(self, path: Any) -> OldChunk: ...
    def zarr_group(self, path: Any) -> zarr.Group: ...


_DISK: _Medium = Disk()
_BUCKET: _Medium = Bucket()


def _of(path: Stem | Where) -> _Medium:
    return _BUCKET if isinstance(path, ObjectPath) else _DISK


def place(path: str | Where) -> Where:
    """The path as a place."""
    return Path(path) if isinstance(path, str) else path


def stem(path: Where) -> Stem:
    """What the paths of files begin with that stand below `path`, up to their names."""
    return _of(path).stem(path)


def below(root: Stem, file: str) -> Stem:
    """The file with this path below what `stem` gave."""
    return _of(root).below(root, file)


def replace(path: Where, data: bytes) -> None:
    """Makes `path` hold `data`; durable when it returns. Raises OSError and Halt."""
    _of(path).replace(path, data)


def replace_unsynced(path: Where, data: bytes) -> None:
    """The same without waiting for the disk: what a power cut leaves may be anything. Raises OSError."""
    _of(path).replace_unsynced(path, data)


def creating(path: Where, data: bytes, on_step: Callable[[str], None]) -> AbstractContextManager[Creating]:
    """Makes ready to create `path` with these contents, which are durable then; `on_step` is told of `temp-commit` and
    `link`. Raises OSError and Halt."""
    return _of(path).creating(path, data, on_step)


def write_new(path: Stem | Path, data: bytes) -> None:
    """A new file, which need not survive a power cut before it is synced. Raises OSError."""
    _of(path).write_new(path, data)


def contents(path: str | Where) -> bytes:
    """All that is in a file. Raises OSError."""
    return _of(path).contents(path)


def some(path: Where, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` to before `stop`, or fewer where it ends before. Raises OSError."""
    return _of(path).some(path, start, stop)


def size(path: Stem | Path) -> int:
    """The bytes of a file. Raises OSError."""
    return _of(path).size(path)


def clear_temporaries(path: Where) -> None:
    """Deletes the files that were being written in the directory of a state, or right below. Raises OSError."""
    _of(path).clear_temporaries(path)


def names(path: Where) -> list[str]:
    """What stands directly below, in order; nothing where there is no such directory. Raises OSError."""
    return _of(path).names(path)


def sizes(path: Where) -> dict[str, int]:
    """Every file below, by its path from there, and its bytes. Raises OSError, but for what goes meanwhile."""
    return _of(path).sizes(path)


def weight(path: Where) -> int:
    """The bytes of a file, or of all files below a directory; −1 if it is not there. Raises OSError."""
    return _of(path).weight(path)


def taken(path: Where, seen: set[int]) -> dict[str, int]:
    """Bytes that each file or directory directly below takes, with all that is in it: on a disk whole blocks, where
    files whose inodes are in `seen` count as nothing, and those that are counted are added to it. Raises OSError."""
    return _of(path).taken(path, seen)


def unreadable(path: Where, names: Sequence[str]) -> Iterator[Where]:
    """Of these files and directories directly below, and of all that is in them, those that may not be read, as far as
    that is known beforehand."""
    return _of(path).unreadable(path, names)


def remove(path: Where) -> None:
    """Deletes a file, if it is there. Raises OSError."""
    path.unlink(missing_ok=True)


def remove_tree(path: Stem | Path) -> None:
    """Deletes a directory with all that is in it. Raises OSError."""
    _of(path).remove_tree(path)


def drop_tree(path: Stem | Path) -> None:
    """The same, as far as it can be done."""
    _of(path).drop_tree(path)


def made(path: Where) -> Sequence[Where]:
    """Makes the directory, and those it lies in where they are not there; returns all that were made, and itself. Their
    names are not synced yet. Raises OSError."""
    return _of(path).made(path)


def directory(path: Stem) -> None:
    """Makes a directory, which must not be there. Raises OSError."""
    _of(path).directory(path)


def open_directory(path: Where) -> None:
    """Makes a directory that may be there, and that others can see before anything is in it. Raises OSError."""
    _of(path).open_directory(path)


def appearing(final: Where, name: str) -> AbstractContextManager[Where]:
    """Where a directory is to be filled that is `final` once the block has ended: the `name` beside it, where nothing
    is left of an earlier try; on an object store itself. Durable then. Raises OSError, and Halt if an fsync failed."""
    return _of(final).appearing(final, name)


def take(source: Stem, target: Stem) -> None:
    """Gives a file another name besides: a hard link on a disk, a copy on an object store. Raises OSError."""
    _of(source).take(source, target)


def rename(path: Where, target: Where) -> None:
    """Gives a file, or a directory with all that is in it, another name; not synced. On an object store each object is
    copied, then all are deleted. Raises OSError."""
    _of(path).rename(path, target)


def sync(path: Stem | Path) -> None:
    """Has a file, or the names in a directory, survive a power cut. Raises OSError, and Halt if an fsync failed."""
    _of(path).sync(path)


def sync_all(paths: Sequence[Stem]) -> None:
    """The same of several, which are on one medium. Raises as `sync`."""
    if paths:
        _of(paths[0]).sync_all(paths)


def sync_tree(path: Where, between: Callable[[], None] | None = None) -> None:
    """The same of every file below, then of every directory; `between` is called between the two."""
    _of(path).sync_tree(path, between)


def free(path: Where) -> int | None:
    """How many bytes there is room for; None where nobody says. Raises OSError."""
    return _of(path).free(path)


def block(path: Where) -> int:
    """Every file takes whole blocks of so many bytes. Raises OSError."""
    return _of(path).block(path)


def new_chunk(path: Stem, nbytes: int) -> NewChunk:
    """A new file that will have so many bytes. Raises OSError."""
    return _of(path).new_chunk(path, nbytes)


def old_chunk(path: Stem) -> OldChunk:
    """A file that is there. Raises OSError."""
    return _of(path).old_chunk(path)


def zarr_group(path: Where) -> zarr.Group:
    """A generation as zarr-python opens it, read-only."""
    return _of(path).zarr_group(path)


class Several:
    """Many small pieces of work on a place: one after the other on a disk, several at a time on an object store, where
    each of them waits for an answer. From any thread."""

    def __init__(self, at: Where) -> None:
        at_once = _of(at).at_once
        self._pool = ThreadPoolExecutor(at_once, "store") if at_once > 1 else None
        self._begun: list[Future[None]] = []

    def do(self, work: Callable[..., None], *args: object) -> None:
        """Does a piece of work, or begins it. Raises what it raises."""
        if self._pool is None:
            work(*args)
        else:
            self._begun.append(self._pool.submit(work, *args))

    def wait(self) -> None:
        """Waits for what was begun. Raises what the first raised that failed."""
        while self._begun:
            self._begun.pop(0).result()

    def end(self) -> None:
        """Begins nothing more, and waits for what is under way."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def each(at: Sequence[Where], work: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """What `work` makes of each item, as many at a time as is worth it for one of these places. Raises what it
    raises."""
    at_once = max(_of(place).at_once for place in at)
    if at_once == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(at_once, "store") as pool:
        yield from pool.map(work, items)
