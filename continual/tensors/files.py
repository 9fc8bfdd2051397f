"""The files of a model, opened once and read by `pread`: never mapped, because a mapped file that its publisher truncates kills the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from continual.errors import Refuse, Retry
from continual.records import FileStat

_LARGE_CONFIG = 32 << 20


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into Retry that names the file: a file that cannot be read now says nothing about the model."""
    try:
        yield
    except OSError as error:
        raise Retry(f"{path}: cannot be read ({error.strerror}); nothing was settled") from error


class Files:
    """Weight files of one model, open for reading. `stats` says what they were when they were opened."""

    def __init__(self, paths: Sequence[Path], root: Path | None) -> None:
        """Opens `paths`. Raises Refuse if one leads out of `root` through a symbolic link, Retry if one cannot be opened."""
        self.paths = tuple(paths)
        self._fds: list[int] = []
        try:
            for path in paths:
                inside(path, root)
                with reading(path):
                    self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self.stats = tuple(self._stat(i) for i in range(len(paths)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files."""
        while self._fds:
            os.close(self._fds.pop())

    def _stat(self, file: int) -> FileStat:
        with reading(self.paths[file]):
            stat = os.fstat(self._fds[file])
        return FileStat(self.paths[file].name, stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def pread(self, file: int, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`. Raises Retry if the file ends before."""
        data = bytearray(length)
        self.preadv(file, memoryview(data), offset)
        return bytes(data)

    def preadv(self, file: int, into: memoryview, offset: int) -> None:
        """Fills `into` from `offset`. Raises Retry if the file ends before: it was cut while it was read."""
        done = 0
        with reading(self.paths[file]):
            while done < len(into):
                count = os.preadv(self._fds[file], [into[done:]], offset + done)
                if count == 0:
                    raise Retry(f"{self.paths[file]}: became shorter while it was read; nothing was settled")
                done += count

    def will_need(self, file: int, offset: int, length: int) -> None:
        """Asks the kernel to read this part ahead."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fds[file], offset, length, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raises Retry naming the first file that was rewritten, replaced or deleted since it was opened."""
        for i, (path, before) in enumerate(zip(self.paths, self.stats, strict=True)):
            with reading(path):
                named = os.stat(path)
            now = FileStat(path.name, named.st_size, named.st_mtime_ns, named.st_ino)
            if self._stat(i) != before or now != before:
                raise Retry(f"{path}: changed while it was read; nothing was settled, it is taken up again when it is still")


def inside(path: Path, root: Path | None) -> None:
    """Raises Refuse if `path` leads out of `root` when its symbolic links are followed; None allows any place."""
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise Refuse("outside", f"{path} leads out of the watched folder, to {path.resolve()}: publish the file itself")


def small_file(path: Path, root: Path | None) -> bytes:
    """A configuration file's contents, of at most 32 MiB."""
    inside(path, root)
    with reading(path):
        if path.stat().st_size > _LARGE_CONFIG:
            raise Refuse("header", f"{path}: too large for a configuration file")
        return path.read_bytes()
