"""What a state asks of an object store: a conditional create, copies that the store makes itself, and writes that are
durable when they are answered. There are no directories. storing.py says what each is for, and what it raises."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from continual.errors import Halt, Retry
from continual.stores import ObjectPath

_PATIENCE = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between looks at a store that does not answer, once it is unknown what it did."""


class Bucket:
    """Any bucket of any store: a path knows which."""

    at_once = 16

    def stem(self, path: ObjectPath) -> ObjectPath:
        return path

    def below(self, root: ObjectPath, file: str) -> ObjectPath:
        return root / file

    def replace(self, path: ObjectPath, data: bytes) -> None:
        path.objects.put(path.key, data)

    replace_unsynced = write_new = replace

    @contextlib.contextmanager
    def creating(self, path: ObjectPath, data: bytes, on_step: Callable[[str], None]) -> Iterator[NewObject]:
        on_step("temp-commit")
        on_step("link")
        yield NewObject(path, data)

    def contents(self, path: ObjectPath) -> bytes:
        return path.read_bytes()

    def some(self, path: ObjectPath, start: int, stop: int) -> bytes:
        return bytes(path.objects.get(path.key, start, stop)[0])

    def size(self, path: ObjectPath) -> int:
        return path.objects.head(path.key).nbytes

    def clear_temporaries(self, path: ObjectPath) -> None:
        """There are none."""

    def names(self, path: ObjectPath) -> list[str]:
        return path.objects.children(path.key)

    def sizes(self, path: ObjectPath) -> dict[str, int]:
        return {one.name: one.nbytes for one in path.objects.below(path.key)}

    def remove_tree(self, path: ObjectPath) -> None:
        path.objects.delete([f"{path.key}/{one.name}" for one in path.objects.below(path.key)])

    def drop_tree(self, path: ObjectPath) -> None:
        with contextlib.suppress(OSError):
            self.remove_tree(path)

    def made(self, path: ObjectPath) -> list[ObjectPath]:
        return [path]

    def directory(self, path: ObjectPath) -> None:
        """It is there once something is in it."""

    def open_directory(self, path: ObjectPath) -> None:
        path.objects.put(f"{path.key}/.there", b"")

    def take(self, source: ObjectPath, target: ObjectPath) -> None:
        source.objects.copy(source.key, target.key)

    def rename(self, path: ObjectPath, target: ObjectPath) -> None:
        files = [f"/{file}" for file in self.sizes(path)] + ([""] if path.is_file() else [])
        for file in files:
            path.objects.copy(path.key + file, target.key + file)
        path.objects.delete([path.key + file for file in files])

    def sync(self, path: ObjectPath) -> None:
        """What was answered is durable."""

    def sync_all(self, paths: Sequence[ObjectPath]) -> None:
        """What was answered is durable."""

    def sync_tree(self, _path: ObjectPath, between: Callable[[], None] | None) -> None:
        if between is not None:
            between()

    def free(self, path: ObjectPath) -> None:
        """Nobody says."""

    def block(self, _path: ObjectPath) -> int:
        return 1


class NewObject:
    """An object that is about to be made, where there must be none."""

    def __init__(self, path: ObjectPath, data: bytes) -> None:
        self._path, self._data = path, data

    def make(self, may: Callable[[], None] = lambda: None) -> None:
        """Creates it. An answer may be lost, or come to a request that was repeated: who is told that there is such an
        object, or nothing, reads it back, and it is ours where it has our bytes."""
        path, wait, unknown = self._path, iter(_PATIENCE), False
        while True:
            try:
                may()
                path.objects.create(path.key, self._data)
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
                if path.read_bytes() == self._data:
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

    def sync(self) -> None:
        """What was answered is durable."""


def _unknown(path: ObjectPath) -> str:
    return (
        f"{path}: the store was asked to make it, and does not say whether it did: start again once the store answers, "
        "and what stands there counts"
    )
