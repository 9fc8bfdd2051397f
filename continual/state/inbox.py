"""What must survive a restart besides the merge: pushes that were accepted and are not settled yet, and how far a
source has come. Framed JSON, one file each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from continual.errors import Retry
from continual.state import framing, storing
from continual.state.durable import environment
from continual.state.fields import body_of, record_of
from continual.stores import Where

MOST = 10_000
"""Pushes that may wait."""
_NAME = re.compile(r"[a-z0-9-]{1,64}")


def name_of(repo: str, sha: str) -> str:
    """The name of the push of a commit."""
    return hashlib.sha256(f"{repo}@{sha}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class PushRecord:
    """An accepted push: a commit of a repo (None: whatever is the newest when it is looked at), and when it came, in
    seconds since 1970."""

    repo: str
    sha: str | None
    time: float


class Inbox:
    """Accepted pushes of the state in `path`, by a name that is the same for the same push. Safe from several
    threads."""

    def __init__(self, path: Where) -> None:
        self._directory = path / "inbox"

    def put(self, name: str, push: PushRecord) -> bool:
        """Keeps a push; on disk when it returns. False if it was there already. Raises Retry if the disk or the number
        of pushes gets in the way."""
        file = self._file(name)
        if file.exists():
            return False
        with environment("cannot keep the push"):
            _made(self._directory)
            if len(storing.names(self._directory)) >= MOST:
                raise Retry(f"{self._directory}: {MOST} pushes wait already; nothing was accepted")
            storing.replace(file, framing.encode(body_of(push))[0])
        return True

    def items(self, but: Collection[str] = ()) -> dict[str, PushRecord]:
        """The pushes that wait, by name, without those whose names are in `but`. Raises Damaged naming a file that was
        altered."""
        names = [name for name in storing.names(self._directory) if name.endswith(".json") and name[0] != "."]
        files = {name[:-5]: self._directory / name for name in names if name[:-5] not in but}
        return {name: record_of(PushRecord, framing.decode(file)[0], file) for name, file in files.items()}

    def remove(self, name: str) -> None:
        """A push is settled."""
        with environment("cannot remove the push"):
            storing.remove(self._file(name))

    def _file(self, name: str) -> Where:
        assert _NAME.fullmatch(name), name
        return self._directory / f"{name}.json"


def save_cursor(path: Where, source: str, body: Mapping[str, object]) -> None:
    """Keeps how far `source` has come with the state in `path`; on disk when it returns. Raises Retry."""
    with environment("cannot keep the cursor"):
        _made(path / "sources")
        storing.replace(path / "sources" / f"{source}.json", framing.encode(body)[0])


def load_cursor(path: Where, source: str) -> dict[str, object] | None:
    """What `save_cursor` kept, None if nothing. Raises Damaged: without that file the source begins anew, and nothing
    is lost."""
    file = path / "sources" / f"{source}.json"
    return framing.decode(file)[0] if file.exists() else None


def _made(directory: Where) -> None:
    if not directory.is_dir():
        directory.mkdir(exist_ok=True)
        storing.sync(directory.parent)
