"""Whether bytes are those of a file on the Hub: the SHA-256 of a file in LFS, git's blob id of any other."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from continual.hub.answers import RemoteFile


class Hashing:
    """The hash of a file, taken in the order of its bytes; `at`: how many were taken."""

    def __init__(self, file: RemoteFile, size: int | None = None) -> None:
        """`size`: of the contents that are hashed, where that may be another than the file's."""
        blob = b"blob %d\0" % (file.size if size is None else size)
        self.at = 0
        self._said = file.sha256 or file.oid
        self._hash = hashlib.sha256() if file.sha256 else hashlib.sha1(blob, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        self._hash.update(data)
        self.at += len(data)

    @property
    def digest(self) -> str:
        """The hash of what was taken until now."""
        return self._hash.hexdigest()

    @property
    def fits(self) -> bool:
        """Whether it is the hash that the Hub says."""
        return self.digest == self._said


def is_known(file: RemoteFile) -> bool:
    """Whether the Hub says a hash of the file. A mirror may not."""
    return bool(file.sha256) or len(file.oid) == 40


def same(contents: Path | bytes, file: RemoteFile) -> bool:
    """Whether `contents` are those of a file on the Hub; not, where the Hub says no hash of it."""
    size = len(contents) if isinstance(contents, bytes) else contents.stat().st_size
    hashing = Hashing(file, size)
    with io.BytesIO(contents) if isinstance(contents, bytes) else open(contents, "rb") as opened:
        while part := opened.read(1 << 20):
            hashing.update(part)
    return size == file.size and is_known(file) and hashing.fits
