"""The files of a model, opened once and read by `pread`: never mapped, because a mapped file that its publisher
truncates kills the process.

What is opened here was put there by others: only regular files are read, and where a root is given only such as lie in
it, whatever links lead to them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from continual.errors import Refuse, Retry
from continual.outside import Irregular
from continual.records import FileStat
from continual.tensors.checkpoints.descriptors import SHARED, Identity, ModelFile, changed

LARGEST_CONFIG = 64 << 20


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into Retry that names the file: a file that cannot be read now says nothing about the model.

    What can never be read whatever the environment does (a circle of links, a name too long, a socket) is Refuse.
    """
    try:
        yield
    except Irregular as error:
        raise Refuse("no-file", str(error)) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise Refuse("no-file", f"{path}: leads to no file ({error.strerror})") from error
        raise Retry(f"{path}: cannot be read ({error.strerror}); nothing was settled") from error


class Files:
    """Files of one model, open for reading. `stats` says what they were when they were opened.

    Only some of them hold a descriptor at a time (descriptors.py).
    """

    def __init__(self, paths: Sequence[Path], root: Path | None, names: Sequence[str] | None = None) -> None:
        """Opens `paths`; `names` are theirs in the model, where that has folders. Raises Refuse if one is no regular
        file or lies outside `root`, Retry if one cannot be opened."""
        self.paths = tuple(paths)
        self._files = tuple(ModelFile(path, root) for path in paths)
        try:
            for file in self._files:
                with reading(file.path), SHARED.reading(file):
                    pass
        except BaseException:
            self.close()
            raise
        stats = tuple(file.stat for file in self._files)
        self.stats = stats if names is None else tuple(map(_named, stats, names))

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            SHARED.close(file)

    def pread(self, file: int, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`. Raises Retry if the file ends before, or was exchanged."""
        data = bytearray(length)
        self.preadv(file, memoryview(data), offset)
        return bytes(data)

    def preadv(self, file: int, into: memoryview, offset: int) -> None:
        """Fills `into` from `offset`. Raises Retry if the file ends before: it was cut while it was read; or if it was
        exchanged."""
        done = 0
        with reading(self.paths[file]), SHARED.reading(self._files[file]) as fd:
            while done < len(into):
                count = os.preadv(fd, [into[done:]], offset + done)
                if count == 0:
                    raise Retry(f"{self.paths[file]}: became shorter while it was read; nothing was settled")
                done += count

    def expect(self, extents: Sequence[tuple[int, int, int]]) -> None:
        """Nothing: the kernel reads ahead by itself."""

    def will_need(self, file: int, offset: int, length: int) -> None:
        """Asks the kernel to read this part ahead. Raises Retry if the file was exchanged."""
        with contextlib.suppress(OSError), SHARED.reading(self._files[file]) as fd:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def look_again(self, file: int) -> None:
        """Does nothing: what is read of a disk is the file's."""

    def check_unchanged(self) -> None:
        """Raises Retry naming the first file that was rewritten, replaced or deleted since it was opened."""
        for file in self._files:
            with reading(file.path):
                named = Identity.of(os.stat(file.path), of_others=file.root is not None)
            if named != file.identity:
                raise Retry(changed(file.path))


def _named(stat: FileStat, name: str) -> FileStat:
    return replace(stat, name=name)


def small_file(path: Path, root: Path | None) -> bytes:
    """The contents of a configuration file of at most 64 MiB. Raises Refuse if it is larger, as for any other file of a
    model."""
    files = Files([path], root)
    try:
        size = files.stats[0].size
        if size > LARGEST_CONFIG:
            raise Refuse("config", f"{path}: {size} bytes are too many for a configuration file")
        return files.pread(0, size, 0)
    finally:
        files.close()
