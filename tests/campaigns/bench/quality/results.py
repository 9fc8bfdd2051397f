"""A file of results of the quality benchmark, one a line: what stands there is not asked again."""

from __future__ import annotations

import fcntl
import functools
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Key:
    """One result: the merge of the first `count` tasks of an order, read in one way; rule `base` and `own` are the base
    and the fine-tunes themselves. Read `alone`: each fine-tune by itself, a merge of one model, as the rule reads it by
    default."""

    order: int
    rule: str
    count: int
    read: str


def bits(found: Mapping[str, Tensor]) -> dict[str, str]:
    """Right and wrong answers by task, as text."""
    return {task: "".join("1" if right else "0" for right in answers.tolist()) for task, answers in found.items()}


class Results:
    """The file, held by this process alone until `close`: a second run that writes it would ask the same again.

    A line that a kill cut off is taken away. Raises SystemExit where another run holds the file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._out = file.open("a+")
        try:
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._out.close()
            raise SystemExit(f"{file}: another run writes it; take another --work, or another --form") from None
        self._out.seek(0)
        text = self._out.read()
        self._out.truncate(len(_whole(text).encode()))
        self.rows = _parsed(text)
        self.known = {Key(row["order"], row["rule"], row["count"], row["read"]) for row in self.rows}

    def add(self, key: Key, **values: Any) -> None:
        """Writes a result, with the version of the code that it was made by."""
        row = {"order": key.order, "rule": key.rule, "count": key.count, "read": key.read, "by": revision(), **values}
        self._out.write(json.dumps(row) + "\n")
        self._out.flush()
        self.rows.append(row)
        self.known.add(key)

    def close(self) -> None:
        """Lets go of the file."""
        self._out.close()


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The results in a file, which another run may be writing."""
    return _parsed(file.read_text())


def _whole(text: str) -> str:
    """Without a line that has no end."""
    return text[: text.rfind("\n") + 1]


def _parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _whole(text).splitlines()]


@functools.cache
def revision() -> str:
    """The commit of the working tree that this module lies in, short; `+` where tracked files differ from it. Empty
    outside a clone."""
    here = Path(__file__).parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True
    )
    return said.stdout.strip()
