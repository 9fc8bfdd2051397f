"""Takes files and directories of one state into another: as hard links, else as copies that share their blocks where
the file system can do that (reflinks), else as plain copies. No knowledge of what is taken."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from continual.state import storing
from continual.stores import ObjectPath, Where

_FICLONE = 0x40049409
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(slots=True)
class Taking:
    """How files are taken, and what was taken so far. `link`: whether hard links to the source may be made; `step` is
    called after each file.

    A file that has several names in the source has as many in the target: `same` maps device and inode of those that
    were seen to the name in the target.
    """

    link: bool
    step: Callable[[], None]
    linked: int = 0
    copied: int = 0
    copied_bytes: int = 0
    same: dict[tuple[int, int], Path] = field(default_factory=dict)

    def file(self, source: Where, target: Where, *, apart: bool = False) -> None:
        """Takes a file; `apart`: as a copy. Not synced. Raises OSError."""
        disks = on_disks(source, target)
        if disks is None:
            self.copied_bytes += _carried(source, target)
            self.copied += 1
        else:
            self._file(*disks, apart)

    def _file(self, source: Path, target: Path, apart: bool) -> None:
        if self.link and not apart and _linked(source, target):
            self.linked += 1
            return
        told = source.stat()
        twin = self.same.get((told.st_dev, told.st_ino))
        if twin is not None and not apart and _linked(twin, target):
            return
        _copied(source, target)
        self.copied += 1
        self.copied_bytes += told.st_size
        if told.st_nlink > 1:
            self.same[told.st_dev, told.st_ino] = target

    def tree(self, source: Where, final: Where, name: str, apart: str) -> None:
        """Takes a directory with all that is in it as `final`: under the `name` beside it until all is on disk. What an
        earlier try left there is dropped. Files called `apart` are always copied; to an object store as the last, and
        there is no other name there. Raises OSError, and Halt if an fsync failed."""
        with storing.appearing(final, name) as at:
            disks = on_disks(source, at)
            if disks is None:
                self._carry(source, at, apart)
                return
            self._walk(*disks, apart)
            for inode, path in self.same.items():
                if path.is_relative_to(disks[1]):
                    self.same[inode] = disks[1].with_name(final.name) / path.relative_to(disks[1])

    def _walk(self, source: Path, target: Path, apart: str) -> None:
        for root, _, names in os.walk(source, onerror=_raise):
            directory = target / Path(root).relative_to(source)
            directory.mkdir()
            for name in names:
                self._file(Path(root, name), directory / name, name == apart)
                self.step()

    def _carry(self, source: Where, target: Where, last: str) -> None:
        """Copies all files from or to an object store, several at a time, and then those called `last`."""
        files = sorted(storing.sizes(source))
        if not files:
            raise FileNotFoundError(errno.ENOENT, "there is nothing", str(source))
        for parent in {(target / file).parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
        for some in (
            [file for file in files if Path(file).name != last],
            [file for file in files if Path(file).name == last],
        ):
            for nbytes in storing.each((source, target), lambda file: _carried(source / file, target / file), some):
                self.copied += 1
                self.copied_bytes += nbytes
                self.step()

    def know(self, source: Where, target: Where) -> None:
        """The directory `target` has been taken from `source` before: files of `source` that have several names are
        not copied again."""
        disks = on_disks(source, target)
        if disks is None:
            return
        for root, _, names in os.walk(disks[0]):
            for name in names:
                file = Path(root, name)
                with contextlib.suppress(FileNotFoundError):
                    told, twin = file.stat(), disks[1] / file.relative_to(disks[0])
                    if told.st_nlink > 1 and (self.link or not twin.samefile(file)):
                        self.same[told.st_dev, told.st_ino] = twin


def on_disks(source: Where, target: Where) -> tuple[Path, Path] | None:
    """Both as paths on a disk; None where one of them is on an object store, so that no file of the one can be a file
    of the other."""
    return (source, target) if isinstance(source, Path) and isinstance(target, Path) else None


def _raise(error: OSError) -> None:
    raise error


def _carried(source: Where, target: Where) -> int:
    """Copies a file from or to an object store; returns its bytes. They do not travel within one bucket."""
    if isinstance(source, ObjectPath) and isinstance(target, ObjectPath) and source.objects.url == target.objects.url:
        source.objects.copy(source.key, target.key)
        return storing.size(target)
    data = storing.contents(source)
    storing.write_new(target, data)
    return len(data)


def _linked(source: Path, target: Path) -> bool:
    """Makes a hard link, if the file system allows one."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _copied(source: Path, target: Path) -> None:
    """Makes a copy that shares its blocks, or a plain one."""
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            shutil.copyfileobj(old, new, 1 << 20)
