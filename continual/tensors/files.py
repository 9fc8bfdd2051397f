"""The files of a model, opened once and read by `pread`: never mapped, because a mapped file that its publisher
truncates kills the process.

What is opened here was put there by others: only regular files are read, and where a root is given only such as lie in
it, whatever links lead to them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from continual.errors import Refuse, Retry
from continual.records import FileStat

LARGEST_CONFIG = 32 << 20


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into Retry that names the file: a file that cannot be read now says nothing about the model.

    What can never be read whatever the environment does (a circle of links, a name too long, a socket) is Refuse.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise Refuse("no-file", f"{path}: leads to no file ({error.strerror})") from error
        raise Retry(f"{path}: cannot be read ({error.strerror}); nothing was settled") from error


class Files:
    """Files of one model, open for reading. `stats` says what they were when they were opened."""

    def __init__(self, paths: Sequence[Path], root: Path | None) -> None:
        """Opens `paths`. Raises Refuse if one is no regular file or lies outside `root`, Retry if one cannot be
        opened."""
        self.paths = tuple(paths)
        self.root = root
        self._fds: list[int] = []
        try:
            for path in paths:
                self._fds.append(_open(path, root))
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
            return _file_stat(self.paths[file], os.fstat(self._fds[file]))

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

    def expect(self, extents: Sequence[tuple[int, int, int]]) -> None:
        """Nothing: the kernel reads ahead by itself."""

    def will_need(self, file: int, offset: int, length: int) -> None:
        """Asks the kernel to read this part ahead."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fds[file], offset, length, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raises Retry naming the first file that was rewritten, replaced or deleted since it was opened."""
        for i, (path, before) in enumerate(zip(self.paths, self.stats, strict=True)):
            with reading(path):
                named = _file_stat(path, os.stat(path))
            if self._stat(i) != before or named != before:
                raise Retry(
                    f"{path}: changed while it was read; nothing was settled, it is taken up again when it is still"
                )


def small_file(path: Path, root: Path | None) -> bytes:
    """The contents of a configuration file of at most 32 MiB. Raises Refuse if it is larger, as for any other file of a
    model."""
    files = Files([path], root)
    try:
        size = files.stats[0].size
        if size > LARGEST_CONFIG:
            raise Refuse("config", f"{path}: {size} bytes are too many for a configuration file")
        return files.pread(0, size, 0)
    finally:
        files.close()


def _open(path: Path, root: Path | None) -> int:
    """A descriptor of a regular file. Where it lies is asked of the kernel once it is open, so that no link can be
    exchanged in between."""
    with reading(path):
        fd = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        )  # a FIFO without a writer must not block
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Refuse("no-file", f"{path}: is no regular file")
            if root is not None:
                target = Path(os.readlink(f"/proc/self/fd/{fd}"))
                if not target.is_relative_to(root.resolve()):
                    raise Refuse(
                        "outside", f"{path} leads out of the watched folder, to {target}: publish the file itself"
                    )
        except BaseException:
            os.close(fd)
            raise
    return fd


def _file_stat(path: Path, found: os.stat_result) -> FileStat:
    return FileStat(path.name, found.st_size, found.st_mtime_ns, found.st_ino)
