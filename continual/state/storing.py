"""The contract of what a state lies on: put, create, get, list, delete, and what else a state needs, for a place on a
disk and for one on an object store. A disk has the durable writes of durable.py, hard links and flock; an object store
has a conditional create, copies that it makes itself, and writes that are durable when they are answered.

    put       replace               the old contents or the new, for every reader
    create    creating              one of those who race makes it; the others are told
    get       contents, some        all of it, or a range
    list      names, sizes          what stands directly below, or every file below
    delete    remove, remove_tree

What goes wrong is an OSError for either, and `Halt` where it is unknown what came of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, TypeVar

from continual.errors import Halt, Retry
from continual.state import durable
from continual.stores import ObjectPath, Where

Stem: TypeAlias = str | ObjectPath
"""A path on a disk as a text, or a place on an object store: either goes on by `+`."""
A = TypeVar("A")
B = TypeVar("B")
_AT_ONCE = 16
"""Requests on their way to an object store at a time."""
_PATIENCE = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between looks at a store that does not answer, once it is unknown what it did."""


def place(path: str | Where) -> Where:
    """The path as a place."""
    return Path(path) if isinstance(path, str) else path


def stem(path: Where) -> Stem:
    """What the paths of files begin with that stand below `path`, up to their names."""
    return path if isinstance(path, ObjectPath) else f"{path}/"


def below(root: Stem, file: str) -> Stem:
    """The file with this path below what `stem` gave."""
    return root / file if isinstance(root, ObjectPath) else root + file


def replace(path: Where, data: bytes) -> None:
    """Makes `path` hold `data`; durable when it returns. Raises OSError and Halt."""
    if isinstance(path, ObjectPath):
        path.objects.put(path.key, data)
    else:
        durable.replace_bytes(path, data)


def replace_unsynced(path: Where, data: bytes) -> None:
    """The same without waiting for the disk: what a power cut leaves may be anything. Raises OSError."""
    if isinstance(path, ObjectPath):
        path.objects.put(path.key, data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        durable.write_bytes(temporary, data)
        os.rename(temporary, path)
    except OSError:
        durable.discard(temporary)
        raise


class Creating:
    """A file that is about to be made, whose name must be free."""

    def __init__(self, path: Where, data: bytes, temporary: Path | None, directory: int) -> None:
        self._path, self._data, self._temporary, self._directory = path, data, temporary, directory

    def make(self, may: Callable[[], None] = lambda: None) -> None:
        """Has the file stand there. `may` is asked before every try, and raises Halt where it must not be made. Raises
        Retry where another was first, OSError where it does not stand there, Halt where that is unknown."""
        if isinstance(self._path, ObjectPath):
            _created(self._path, self._data, may)
        else:
            assert self._temporary is not None
            durable.link_new(self._path, self._temporary)

    def sync(self) -> None:
        """Has its name survive a power cut. Raises Halt."""
        if isinstance(self._path, Path):
            durable.sync_open(self._directory, self._path.parent)


@contextlib.contextmanager
def creating(path: Where, data: bytes, on_step: Callable[[str], None]) -> Iterator[Creating]:
    """Makes ready to create `path` with these contents, which are durable then; `on_step` is told of `temp-commit` and
    `link`. Raises OSError and Halt."""
    if isinstance(path, ObjectPath):
        on_step("temp-commit")
        on_step("link")
        yield Creating(path, data, None, -1)
        return
    with durable.opened(path.parent) as directory:
        on_step("temp-commit")
        temporary = durable.write_temporary(path, data)
        on_step("link")
        yield Creating(path, data, temporary, directory)


def _created(path: ObjectPath, data: bytes, may: Callable[[], None]) -> None:
    """Creates an object. An answer may be lost, or come to a request that was repeated: who is told that there is such
    an object, or nothing, reads it back, and it is ours where it has our bytes."""
    wait = iter(_PATIENCE)
    unknown = False
    while True:
        try:
            may()
            path.objects.create(path.key, data)
            return
        except Halt:
            if unknown:
                raise Halt(f"{_unknown(path)} (and its lease ran out meanwhile)") from None
            raise
        except FileExistsError:
            trouble: OSError | None = None
        except PermissionError:
            if unknown:
                raise Halt(_unknown(path)) from None
            raise
        except OSError as error:
            trouble, unknown = error, True
        try:
            if path.read_bytes() == data:
                return
            raise Retry(f"{path}: another writer was first; nothing was settled")
        except FileNotFoundError:
            pass  # it is not there, as far as is known: try again
        except OSError as error:
            trouble = error
        try:
            time.sleep(next(wait))
        except StopIteration:
            raise Halt(f"{_unknown(path)} ({trouble})") from trouble


def _unknown(path: ObjectPath) -> str:
    return (
        f"{path}: the store was asked to make it, and does not say whether it did: start again once the store answers, "
        "and what stands there counts"
    )


def write_new(path: Stem | Path, data: bytes) -> None:
    """A new file, which need not survive a power cut before it is synced. Raises OSError."""
    if isinstance(path, ObjectPath):
        path.objects.put(path.key, data)
    else:
        durable.write_bytes(path, data)


def contents(path: str | Where) -> bytes:
    """All that is in a file. Raises OSError."""
    if isinstance(path, ObjectPath):
        return path.read_bytes()
    with open(path, "rb", buffering=0) as file:
        return file.read()


def some(path: Where, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` to before `stop`, or fewer where it ends before. Raises OSError."""
    if isinstance(path, ObjectPath):
        return bytes(path.objects.get(path.key, start, stop)[0])
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def size(path: Stem | Path) -> int:
    """The bytes of a file. Raises OSError."""
    return path.objects.head(path.key).nbytes if isinstance(path, ObjectPath) else os.stat(path).st_size


def clear_temporaries(path: Where) -> None:
    """Deletes the files that were being written in the directory of a state, or right below. Raises OSError."""
    if isinstance(path, Path):
        for leftover in (*path.glob(".*.tmp"), *path.glob("*/.*.tmp")):
            leftover.unlink(missing_ok=True)


def names(path: Where) -> list[str]:
    """What stands directly below, in order; nothing where there is no such directory. Raises OSError."""
    if isinstance(path, ObjectPath):
        return path.objects.children(path.key)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(os.listdir(path))
    return []


def sizes(path: Where) -> dict[str, int]:
    """Every file below, by its path from there, and its bytes. Raises OSError, but for what goes meanwhile."""
    if isinstance(path, ObjectPath):
        return {one.name: one.nbytes for one in path.objects.below(path.key)}
    found = {}
    for root, _, files in os.walk(path):
        for name in files:
            file = os.path.join(root, name)
            with contextlib.suppress(FileNotFoundError):
                found[os.path.relpath(file, path)] = os.lstat(file).st_size
    return found


def remove(path: Where) -> None:
    """Deletes a file, if it is there. Raises OSError."""
    path.unlink(missing_ok=True)


def remove_tree(path: Stem | Path) -> None:
    """Deletes a directory with all that is in it. Raises OSError."""
    if isinstance(path, ObjectPath):
        path.objects.delete([f"{path.key}/{one.name}" for one in path.objects.below(path.key)])
    else:
        durable.remove_tree(path)


def drop_tree(path: Stem | Path) -> None:
    """The same, as far as it can be done."""
    if isinstance(path, ObjectPath):
        with contextlib.suppress(OSError):
            remove_tree(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def made(path: Where) -> list[Where]:
    """Makes the directory, and those it lies in where they are not there; returns all that were made, and itself. Their
    names are not synced yet. Raises OSError."""
    if isinstance(path, ObjectPath):
        return [path]
    found = [p for p in (path.absolute(), *path.absolute().parents) if not p.exists()] or [path.absolute()]
    path.mkdir(parents=True, exist_ok=True)
    return list(found)


def directory(path: Stem) -> None:
    """Makes a directory, which must not be there. Raises OSError."""
    if not isinstance(path, ObjectPath):
        os.mkdir(path)


def open_directory(path: Where) -> None:
    """Makes a directory that may be there, and that others can see before anything is in it. Raises OSError."""
    path.mkdir(exist_ok=True)
    if isinstance(path, ObjectPath):
        path.objects.put(f"{path.key}/.there", b"")


def take(source: Stem, target: Stem) -> None:
    """Gives a file another name besides: a hard link on a disk, a copy on an object store. Raises OSError."""
    if isinstance(source, ObjectPath) and isinstance(target, ObjectPath):
        source.objects.copy(source.key, target.key)
    else:
        assert isinstance(source, str)
        assert isinstance(target, str)
        os.link(source, target)


def rename(path: Where, target: Where) -> None:
    """Gives a file, or a directory with all that is in it, another name; not synced. On an object store each object is
    copied, then all are deleted. Raises OSError."""
    if isinstance(path, ObjectPath) and isinstance(target, ObjectPath):
        files = [f"/{file}" for file in sizes(path)] + ([""] if path.is_file() else [])
        for file in files:
            path.objects.copy(path.key + file, target.key + file)
        path.objects.delete([path.key + file for file in files])
    elif isinstance(path, Path) and isinstance(target, Path):
        os.rename(path, target)


def sync(path: Stem | Path) -> None:
    """Has a file, or the names in a directory, survive a power cut. Raises OSError, and Halt if an fsync failed."""
    if not isinstance(path, ObjectPath):
        durable.sync_file(path)


def sync_all(paths: Sequence[Stem]) -> None:
    """The same of several. Raises as `sync`."""
    if on_disk := [path for path in paths if isinstance(path, str)]:
        durable.sync_all(on_disk)


def sync_tree(path: Where, between: Callable[[], None] | None = None) -> None:
    """The same of every file below, then of every directory; `between` is called between the two."""
    if isinstance(path, Path):
        durable.sync_tree(path, between)
    elif between is not None:
        between()


def free(path: Where) -> int | None:
    """How many bytes there is room for; None where nobody says. Raises OSError."""
    return shutil.disk_usage(path).free if isinstance(path, Path) else None


def block(path: Where) -> int:
    """Every file takes whole blocks of so many bytes. Raises OSError."""
    return os.statvfs(path).f_frsize if isinstance(path, Path) else 1


class Several:
    """Many small pieces of work on a place: one after the other on a disk, several at a time on an object store, where
    each of them waits for an answer. From any thread."""

    def __init__(self, at: Where) -> None:
        self._pool = ThreadPoolExecutor(_AT_ONCE, "store") if isinstance(at, ObjectPath) else None
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


def each(work: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """What `work` makes of each item, several at a time. Raises what it raises."""
    with ThreadPoolExecutor(_AT_ONCE, "store") as pool:
        yield from pool.map(work, items)
