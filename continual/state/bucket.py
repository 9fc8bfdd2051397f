"""What a state asks of an object store: a conditional create, copies that the store makes itself, and writes that are
durable when they are answered. There are no directories. storing.py says what each is for, and what it raises;
bucket_holds.py has leases."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from continual.errors import Halt, Retry
from continual.stores import ObjectPath

if TYPE_CHECKING:
    import zarr

_PATIENCE = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between looks at a store that does not answer, once it is unknown what it did."""
_RANGE = 4 << 20
"""Bytes that are asked for at the least: a request takes as long as about so many bytes."""


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

    def weight(self, path: ObjectPath) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self.size(path)
        below = self.sizes(path)
        return sum(below.values()) if below else -1

    def taken(self, path: ObjectPath, _seen: set[int]) -> dict[str, int]:
        found = Counter[str]()
        for file, nbytes in self.sizes(path).items():
            found[file.partition("/")[0]] += nbytes
        return found

    def unreadable(self, _path: ObjectPath, _names: Sequence[str]) -> Iterator[ObjectPath]:
        """None is known: what may not be read is told as that when it is."""
        return iter(())

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

    @contextlib.contextmanager
    def appearing(self, final: ObjectPath, _name: str) -> Iterator[ObjectPath]:
        """There is no other name, so that whoever fills it writes what makes it whole as the last."""
        yield final

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

    def new_chunk(self, path: ObjectPath, nbytes: int) -> NewBucketChunk:
        return NewBucketChunk(path, nbytes)

    def old_chunk(self, path: ObjectPath) -> OldBucketChunk:
        return OldBucketChunk(path)

    def zarr_group(self, path: ObjectPath) -> zarr.Group:
        import zarr
        from zarr.storage import ObjectStore

        return zarr.open_group(ObjectStore(path.objects.store, read_only=True), path=path.key, mode="r", zarr_format=3)


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


class NewBucketChunk:
    """An object that is written as a whole once its last byte is known."""

    def __init__(self, path: ObjectPath, nbytes: int) -> None:
        self._path = path
        self._data = bytearray(nbytes)
        self._at = 0

    def write(self, data: bytes | memoryview) -> None:
        self._data[self._at : self._at + len(data)] = data
        self._at += len(data)

    def skip(self, count: int) -> None:
        self._at += count

    def finish(self) -> None:
        assert self._at == len(self._data), "fewer bytes than the file has"
        self._path.objects.put(self._path.key, self._data)

    def close(self) -> None:
        self._data = bytearray()


class OldBucketChunk:
    """An object that is read by ranges, of which the last is kept."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._first = 0
        self._kept, self.nbytes = path.objects.get(path.key, 0, _RANGE)

    def read_into(self, into: memoryview, at: int) -> int:
        if not self._first <= at < self._first + len(self._kept):
            if at >= self.nbytes:
                return 0
            # what is left of the chunk behind this piece, its checksum, comes along
            stop = min(self.nbytes, max(at + len(into) + 4, at + _RANGE))
            self._first = at
            self._kept, _ = self._path.objects.get(self._path.key, at, stop)
        found = self._kept[at - self._first :][: len(into)]
        into[: len(found)] = found
        return len(found)

    def read(self, count: int, at: int) -> bytes:
        found = bytearray(count)
        done = 0
        while done < count and (more := self.read_into(memoryview(found)[done:], at + done)):
            done += more
        return bytes(found[:done])

    def close(self) -> None:
        self._kept = memoryview(b"")


def _unknown(path: ObjectPath) -> str:
    return (
        f"{path}: the store was asked to make it, and does not say whether it did: start again once the store answers, "
        "and what stands there counts"
    )
