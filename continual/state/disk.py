"""What a state asks of a disk: the durable writes of durable.py, hard links, directories. storing.py says what each is
for, and what it raises; disk_holds.py has locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from continual.state import durable

if TYPE_CHECKING:
    import zarr


class Disk:
    """Any disk of this machine. A path that is needed often is a text."""

    at_once = 1

    def stem(self, path: Path) -> str:
        return f"{path}/"

    def below(self, root: str, file: str) -> str:
        return root + file

    def replace(self, path: Path, data: bytes) -> None:
        durable.replace_bytes(path, data)

    def replace_unsynced(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            durable.write_bytes(temporary, data)
            os.rename(temporary, path)
        except OSError:
            durable.discard(temporary)
            raise

    @contextlib.contextmanager
    def creating(self, path: Path, data: bytes, on_step: Callable[[str], None]) -> Iterator[NewFile]:
        with durable.opened(path.parent) as directory:
            on_step("temp-commit")
            temporary = durable.write_temporary(path, data)
            on_step("link")
            yield NewFile(path, temporary, directory)

    def write_new(self, path: str | Path, data: bytes) -> None:
        durable.write_bytes(path, data)

    def contents(self, path: str | Path) -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read()

    def some(self, path: Path, start: int, stop: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, path: str | Path) -> int:
        return os.stat(path).st_size

    def clear_temporaries(self, path: Path) -> None:
        for leftover in (*path.glob(".*.tmp"), *path.glob("*/.*.tmp")):
            leftover.unlink(missing_ok=True)

    def names(self, path: Path) -> list[str]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(os.listdir(path))
        return []

    def sizes(self, path: Path) -> dict[str, int]:
        found = {}
        for root, _, files in os.walk(path):
            for name in files:
                file = os.path.join(root, name)
                with contextlib.suppress(FileNotFoundError):
                    found[os.path.relpath(file, path)] = os.lstat(file).st_size
        return found

    def weight(self, path: Path) -> int:
        try:
            told = path.lstat()
        except FileNotFoundError:
            return -1
        return sum(self.sizes(path).values()) if stat.S_ISDIR(told.st_mode) else told.st_size

    def taken(self, path: Path, seen: set[int]) -> dict[str, int]:
        return {entry.name: _taken(entry.path, seen) for entry in os.scandir(path)}

    def unreadable(self, path: Path, names: Sequence[str]) -> Iterator[Path]:
        parts = [path / name for name in names]
        below = (Path(root, name) for part in parts for root, dirs, files in os.walk(part) for name in (*dirs, *files))
        for file in (*parts, *below):
            if not os.access(file, os.R_OK) and file.exists():
                yield file

    def remove_tree(self, path: str | Path) -> None:
        durable.remove_tree(path)

    def drop_tree(self, path: str | Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def made(self, path: Path) -> list[Path]:
        found = [p for p in (path.absolute(), *path.absolute().parents) if not p.exists()] or [path.absolute()]
        path.mkdir(parents=True, exist_ok=True)
        return found

    def directory(self, path: str) -> None:
        os.mkdir(path)

    def open_directory(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def appearing(self, final: Path, name: str) -> Iterator[Path]:
        temporary = final.with_name(name)
        self.drop_tree(temporary)
        yield temporary
        durable.sync_tree(temporary)
        durable.move_away(temporary, final)

    def take(self, source: str, target: str) -> None:
        os.link(source, target)

    def rename(self, path: Path, target: Path) -> None:
        os.rename(path, target)

    def sync(self, path: str | Path) -> None:
        durable.sync_file(path)

    def sync_all(self, paths: Sequence[str]) -> None:
        durable.sync_all(paths)

    def sync_tree(self, path: Path, between: Callable[[], None] | None) -> None:
        durable.sync_tree(path, between)

    def free(self, path: Path) -> int:
        return shutil.disk_usage(path).free

    def block(self, path: Path) -> int:
        return os.statvfs(path).f_frsize

    def new_chunk(self, path: str, _nbytes: int) -> NewDiskChunk:
        return NewDiskChunk(path)

    def old_chunk(self, path: str) -> OldDiskChunk:
        return OldDiskChunk(path)

    def zarr_group(self, path: Path) -> zarr.Group:
        import zarr

        return zarr.open_group(path, mode="r", zarr_format=3)


class NewFile:
    """A name that is about to be made for a temporary file, in the open `directory`."""

    def __init__(self, path: Path, temporary: Path, directory: int) -> None:
        self._path, self._temporary, self._directory = path, temporary, directory

    def make(self, may: Callable[[], None] = lambda: None) -> None:
        may()
        durable.link_new(self._path, self._temporary)

    def sync(self) -> None:
        durable.sync_open(self._directory, self._path.parent)


class NewDiskChunk:
    """A file that is written in order; a hole takes no block."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        durable.write_all(self._fd, data)

    def skip(self, count: int) -> None:
        os.lseek(self._fd, count, os.SEEK_CUR)  # a hole, for which the file system keeps no block

    def finish(self) -> None:
        pass

    def close(self) -> None:
        os.close(self._fd)


class OldDiskChunk:
    """A file that is read in any order."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.nbytes = os.fstat(self._fd).st_size

    def read_into(self, into: memoryview, at: int) -> int:
        return os.preadv(self._fd, [into], at)

    def read(self, count: int, at: int) -> bytes:
        return os.pread(self._fd, count, at)

    def close(self) -> None:
        os.close(self._fd)


def _taken(path: str, seen: set[int]) -> int:
    """Bytes that a file, or all below a directory, take on the disk; files whose inodes are in `seen` count as nothing,
    and those that are counted are added to it."""
    total = _blocks(path, seen) if os.path.isfile(path) else 0
    for root, _, files in os.walk(path):
        total += sum(_blocks(os.path.join(root, file), seen) for file in files)
    return total


def _blocks(file: str, seen: set[int]) -> int:
    with contextlib.suppress(FileNotFoundError):
        told = os.lstat(file)
        if told.st_ino not in seen:
            seen.add(told.st_ino)
            return 512 * told.st_blocks
    return 0
