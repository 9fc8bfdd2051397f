"""The merged model as a release on the Hub: one commit each, found again by (state id, record) in the `continual.json`
that lies in it.

Whatever is interrupted is begun again, and looks first at what is there: the branch's head and its `continual.json` say
whether the release was made. A commit names its parent, so of two writers one fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from continual.config import ReleaseSettings
from continual.errors import Misconfigured, Refuse
from continual.hub import Hub, Info, Trouble, named
from continual.hub.repo import same
from continual.retrying import Fault
from continual.state import Commit
from continual.state.entries import ReleaseEntry
from continual.tensors.place import RELEASE

CARD = "README.md"
_TRIES = 4
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
Exported = Callable[[], AbstractContextManager[Path]]
"""Gives a directory with the exported model, and takes it away afterwards."""


@dataclass(frozen=True, slots=True)
class Released:
    """A release that is out. `new`: this call made the commit; `uploaded`: bytes of the files that were not there
    before."""

    repo: str
    branch: str
    seq: int
    commit: str
    url: str
    tag: str | None
    new: bool
    uploaded: int = 0
    files: int = 0


@dataclass(frozen=True, slots=True)
class Ours:
    """The record that is released: its number, the state's id, and the generation of each record of the state."""

    state: str
    seq: int
    generations: Sequence[str | None]


@dataclass(frozen=True, slots=True)
class Remote:
    """The branch as it is: its head, None where the repo or branch is empty, and our `continual.json` in it, if there
    is one."""

    info: Info | None
    release: Mapping[str, Any] | None


def check(asked: ReleaseSettings) -> None:
    """Raises Misconfigured for settings of a release that cannot be used."""
    found = named(asked.repo or "")
    if asked.repo is not None and (found is None or found.revision or found.repo != asked.repo):
        raise Misconfigured(f"release.repo = {asked.repo}: write ORG/NAME")
    try:
        tag = (asked.tag or "{seq}").format(seq=1)
    except (KeyError, IndexError, ValueError):
        raise Misconfigured(f"release.tag = {asked.tag}: {{seq}} is all it can have in braces") from None
    if "{seq}" not in (asked.tag or "{seq}") or not _TAG.fullmatch(tag):
        raise Misconfigured(
            f"release.tag = {asked.tag}: a tag is letters, digits, '.', '_' and '-' with {{seq}} among them, so that each release has its own"
        )


def look(hub: Hub, asked: ReleaseSettings) -> Remote:
    """What is on the branch. Raises Trouble and Refuse (`gated`)."""
    assert asked.repo is not None
    try:
        info = hub.info(asked.repo, asked.branch)
    except Refuse as error:
        if error.reason != "gone":
            raise
        return Remote(None, None)
    if RELEASE not in info.files:
        return Remote(info, None)
    try:
        body = json.loads(hub.small(asked.repo, info.sha, info.files[RELEASE]))
    except ValueError:
        body = None
    return Remote(
        info, body if isinstance(body, dict) and "state" in body and isinstance(body.get("seq"), int) else None
    )


def may_follow(remote: Remote, asked: ReleaseSettings, state: str, seq: int, generations: Sequence[str | None]) -> bool:
    """Whether record `seq` of `state` is to be committed on top of what is there; False if it is out already.
    `generations` are those of its records.

    Raises Misconfigured where the branch holds something else: another state's releases, a model that is none of ours,
    a later record of this state, or a record that this state does not know (of its time before a backup was restored).
    """
    where = f"release.repo = {asked.repo}, branch {asked.branch}"
    if remote.release is None:
        files = remote.info.files if remote.info is not None else {}
        if "config.json" in files or any(name.endswith(_WEIGHTS) for name in files):
            raise Misconfigured(
                f"{where}: holds a model that continual did not make; name another repo or branch, or empty it first"
            )
        return True
    if remote.release["state"] != state:
        raise Misconfigured(
            f"{where}: holds releases of another state ({str(remote.release['state'])[:12]}); one repo is for one state"
        )
    there = int(remote.release["seq"])
    if there >= len(generations) or generations[there] != remote.release.get("generation"):
        raise Misconfigured(
            f"{where}: holds record {there} of this state as it was before it was restored from a backup; name another repo"
        )
    if there > seq:
        raise Misconfigured(
            f"{where}: holds record {there} of this state, and releases go forward: name another branch for record {seq}"
        )
    return there < seq


def release(
    hub: Hub, asked: ReleaseSettings, ours: Ours, exported: Exported, texts: Callable[[Path], Mapping[str, bytes]]
) -> Released:
    """Publishes a record, unless it is out already, and tags it. `texts` makes, of the directory that was exported,
    files that take the place of its own.

    Makes the repo and the branch where they are not there. Raises Misconfigured, Trouble, and Retry of the export;
    nothing is half there: a commit is whole or not at all.
    """
    repo, seq, tries = asked.repo or "", ours.seq, 0
    uploaded, files, new = 0, 0, False
    with ExitStack() as stack:
        directory: Path | None = None
        while True:
            remote = look(hub, asked)
            if not may_follow(remote, asked, ours.state, seq, ours.generations):
                assert remote.info is not None
                commit = remote.info.sha
                break
            if remote.info is None:
                remote = _create(hub, asked)
            if directory is None:
                directory = stack.enter_context(exported())
            adds, deletes, uploaded = _changes(directory, texts(directory), remote.info)
            try:
                commit, files, new = _commit(hub, asked, adds, deletes, remote.info, f"Record {seq}"), len(adds), True
                break
            except Trouble as error:  # whether it was made is seen on the branch
                tries += 1
                if tries == _TRIES or error.fault in (Fault.TOKEN, Fault.DENIED, Fault.REQUEST):
                    raise
                hub.stop.wait(max(error.after, 0.5 * 2.0**tries))
    tag = (asked.tag or "").format(seq=seq) or None
    if tag is not None:
        _tag(hub, repo, tag, commit, f"Record {seq}")
    return Released(
        repo, asked.branch, seq, commit, f"{hub.endpoint}/{repo}/tree/{commit}", tag, new, uploaded if new else 0, files
    )


def _tag(hub: Hub, repo: str, tag: str, commit: str, message: str) -> None:
    """Makes a tag; one that is there has to be of this commit. Raises Misconfigured, Trouble."""
    what = f"tag {tag} of {repo}"
    there = {ref.name: ref.target_commit for ref in hub.ask(what, lambda: hub.api.list_repo_refs(repo)).tags}
    if there.get(tag, commit) != commit:
        raise Misconfigured(f"{what}: is of another commit ({there[tag][:12]}); remove it, or set release.tag")
    if tag not in there:
        hub.ask(what, lambda: hub.api.create_tag(repo, tag=tag, revision=commit, tag_message=message, exist_ok=True))


def _create(hub: Hub, asked: ReleaseSettings) -> Remote:
    """Makes the repo and the branch; both may be there already."""
    repo = asked.repo or ""
    hub.ask(f"making {repo}", lambda: hub.api.create_repo(repo, private=asked.private, exist_ok=True))
    if asked.branch != "main":
        hub.ask(
            f"making branch {asked.branch} of {repo}",
            lambda: hub.api.create_branch(repo, branch=asked.branch, exist_ok=True),
        )
    return look(hub, asked)


def _changes(
    directory: Path, texts: Mapping[str, bytes], now: Info | None
) -> tuple[dict[str, Path | bytes], list[str], int]:
    """What has to be added to the branch as it is, what goes (weights of before, at its top level), and how many bytes
    that is."""
    adds: dict[str, Path | bytes] = {}
    nbytes = 0
    there = now.files if now else {}
    ours: dict[str, Path | bytes] = {
        str(file.relative_to(directory)): file for file in sorted(directory.rglob("*")) if file.is_file()
    }
    ours |= texts
    for name, file in ours.items():
        known = there.get(name)
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        if known is not None and same(file, known):
            continue
        adds[name] = file
        nbytes += size
    weights = (".safetensors", ".safetensors.index.json")
    return (
        adds,
        sorted(name for name in there if name.endswith(weights) and "/" not in name and name not in ours),
        nbytes,
    )


def _commit(
    hub: Hub,
    asked: ReleaseSettings,
    adds: Mapping[str, Path | bytes],
    deletes: list[str],
    parent: Info | None,
    message: str,
) -> str:
    """One commit on top of `parent`, or none; its hash. Raises Trouble."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [
        CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in adds.items()
    ]
    operations += [CommitOperationDelete(name) for name in deletes]
    how: dict[str, Any] = {
        "commit_message": message,
        "revision": asked.branch,
        "parent_commit": parent.sha if parent else None,
    }
    try:
        return str(
            hub.ask(
                f"commit to {asked.repo}", lambda: hub.api.create_commit(asked.repo or "", operations, **how), tries=1
            ).oid
        )
    except Refuse as error:  # the repo went away meanwhile, or the token may not write there
        raise Trouble(str(error), Fault.GONE) from None


def newest_release(log: Sequence[Commit], repo: str, branch: str) -> ReleaseEntry | None:
    """What the newest record of a release to this branch says; None if there is none."""
    for commit in reversed(log):
        entry = commit.entry
        if isinstance(entry, ReleaseEntry) and (entry.repo, entry.branch) == (repo, branch):
            return entry
    return None
