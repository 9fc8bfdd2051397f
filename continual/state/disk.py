"""What a state asks of a disk: the durable writes of durable.py, hard links, directories. storing.py says what each is
for, and what it raises."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from continual.state import durable


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


class NewFile:
    """A name that is about to be made for a temporary file, in the open `directory`."""

    def __init__(self, path: Path, temporary: Path, directory: int) -> None:
        self._path, self._temporary, self._directory = path, temporary, directory

    def make(self, may: Callable[[], None] = lambda: None) -> None:
        may()
        durable.link_new(self._path, self._temporary)

    def sync(self) -> None:
        durable.sync_open(self._directory, self._path.parent)
