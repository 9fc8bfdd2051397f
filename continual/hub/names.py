"""How a repo of the Hub is written: `ORG/NAME`, `ORG/NAME@REVISION` or `hf://ORG/NAME@REVISION`. Pure functions."""

from __future__ import annotations

import re
from typing import NamedTuple

from continual.records import SCHEME

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,200}")
_SHA = re.compile(r"[0-9a-f]{40}")


class Named(NamedTuple):
    """The id of a repo, and a revision (a commit, branch or tag) where the text has one."""

    repo: str
    revision: str | None


def is_repo(text: object) -> bool:
    """Whether `text` is the id of a repo: letters, digits, `-`, `_`, `.`, with at most one owner before a slash."""
    return isinstance(text, str) and _REPO.fullmatch(text) is not None and ".." not in text and "--" not in text


def is_sha(text: object) -> bool:
    """Whether `text` is the full hash of a commit."""
    return isinstance(text, str) and _SHA.fullmatch(text) is not None


def named(text: str) -> Named | None:
    """The repo and revision that `text` names; None if it cannot name a repo. A text without the scheme needs an owner,
    so that a file name is never taken for a repo."""
    bare = text.removeprefix(SCHEME)
    repo, at, revision = bare.partition("@")
    if not is_repo(repo) or (bare == text and "/" not in repo):
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    return Named(repo, revision or None)
