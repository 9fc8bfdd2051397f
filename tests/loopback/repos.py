"""What a Hub stores: blobs, commits and repositories, all immutable. Who may see them and how they travel is elsewhere.

A change makes a new `Repo`; a reader that holds the old one still sees it whole, which is what makes commits atomic and
lets the Hub answer from a state of some changes ago.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

Gate = Literal[False, "auto", "manual"]

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # .gitattributes of a repo created through the API


PIECE = 1 << 24


class Bytes(Protocol):
    """Bytes by their places: `bytes`, or something that makes them as they are read."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...


def git_oid(kind: str, data: bytes) -> str:
    """The name git gives an object of this kind and content."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of a file, kept by git itself or, if `lfs`, as a large file to which git keeps a pointer."""

    data: Bytes = field(repr=False)
    lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, self.size, PIECE):
            digest.update(self.data[start : start + PIECE])
        return digest.hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The git blob: of the pointer for a large file."""
        return git_oid("blob", self.pointer if self.lfs else self.data[:])

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One commit: all files as of then."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: float
    files: Mapping[str, Blob]


@dataclass(frozen=True)
class PullRequest:
    """A pull request to `main`: its commit `sha`, on top of `parent`; `merged`: the commit that merged it."""

    number: int
    title: str
    description: str
    author: str
    date: float
    sha: str
    parent: str | None
    status: str = "open"
    merged: str | None = None
    comments: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Repo:
    """One model repository. `key` outlives a rename; `modified` moves with every commit to any branch."""

    id: str
    key: str
    created: float
    modified: float
    private: bool = False
    gated: Gate = False
    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[str, Commit] = field(default_factory=dict)
    requests: Mapping[int, PullRequest] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    @property
    def head(self) -> Commit | None:
        sha = self.branches.get("main")
        return self.commits[sha] if sha else None

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag, a full sha or the beginning of one (7 digits or more)."""
        if revision.startswith("refs/pr/"):
            found = self.requests.get(int(revision.removeprefix("refs/pr/")))
            return self.commits[found.sha] if found else None
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(name) or self.tags.get(name) or (revision if revision in self.commits else None)
        if sha is None and len(revision) >= 7:
            sha = next((s for s in self.commits if s.startswith(revision)), None)
        return self.commits[sha] if sha else None

    def history(self, commit: Commit | None) -> Iterator[Commit]:
        """That commit and its ancestors, newest first."""
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The newest commit up to `commit` that touched this file or a file below this folder."""

        def below(files: Mapping[str, Blob]) -> dict[str, str]:
            return {p: blob.oid for p, blob in files.items() if p == path or p.startswith(path + "/")}

        newest = commit
        for past in self.history(commit):
            newest = past
            if below(past.files) != below(self.commits[past.parent].files if past.parent else {}):
                break
        return newest


def commit_sha(files: Mapping[str, Blob], parent: str | None, number: int) -> str:
    """A name for a commit: of its content, its parent and a running number, so that no two are alike."""
    tree = sorted((path, blob.etag) for path, blob in files.items())
    return git_oid("commit", json.dumps([tree, parent, number]).encode())


def tree(files: Mapping[str, Blob], folder: str, *, recursive: bool) -> list[tuple[str, Blob | None]]:
    """The entries of a folder in order of their path; a folder has no blob."""
    prefix = folder + "/" if folder else ""
    found: dict[str, Blob | None] = {}
    for path, blob in files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)) if recursive else range(1, min(len(parts), 2)):
            found[prefix + "/".join(parts[:depth])] = None
        if recursive or len(parts) == 1:
            found[path] = blob
    return sorted(found.items())


def folder_oid(files: Mapping[str, Blob], folder: str) -> str:
    """A name for the content of a folder; not git's own."""
    below = sorted((path, blob.oid) for path, blob in files.items() if path.startswith(folder + "/"))
    return git_oid("tree", json.dumps(below).encode())
