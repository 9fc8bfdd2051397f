"""Putting the merged model on the Hub. A release is one commit; the `continual.json` in it says which record of which
state it is of.

A release that was interrupted is begun again. It first looks at the branch: its head and the `continual.json` there say
whether the release was made. A commit names its parent, so one of two writers fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from continual.config import ReleaseSettings
from continual.errors import Misconfigured, Refuse
from continual.hub import Hub, Info, Trouble, named
from continual.hub.names import is_sha
from continual.outside import Malformed, parse_fields
from continual.publish.changes import changes_to, operations_of, readable
from continual.publish.provenance import shares_in
from continual.retrying import Fault
from continual.state.parts import ReleasedShare
from continual.tensors.checkpoints.files import LARGEST_CONFIG
from continual.tensors.checkpoints.place import RELEASE

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

CARD = "README.md"
TRIES = 4
"""How often a commit is tried."""
_COMMIT_SECONDS, _SLOWEST = 600.0, 20_000
"""A commit has failed after so many seconds, and one for so many bytes."""
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
Exported = Callable[[], AbstractContextManager[Path]]
"""Gives a directory with the exported model, and takes it away afterwards."""


@dataclass(frozen=True, slots=True)
class Released:
    """A release that is out. `new`: whether this call made the commit; `files` and `uploaded`: how many files that
    commit brought, and their bytes. `mark`: that of the release that is out, None where it has none; `shares`: what its
    models have in it, the largest change first, None where it does not say."""

    repo: str
    branch: str
    seq: int
    commit: str
    url: str
    tag: str | None
    new: bool
    uploaded: int = 0
    files: int = 0
    mark: str | None = None
    shares: tuple[ReleasedShare, ...] | None = None


@dataclass(frozen=True, slots=True)
class Ours:
    """The record that is released: its number, the state's id, and the generation of each record of the state. `view`:
    the name of the view that is released, empty for the merge; `mark`: a digest of what goes out and of its form;
    `backwards`: whether it may take the place of a later record, as of a canary that is taken back."""

    state: str
    seq: int
    generations: Sequence[str | None]
    view: str = ""
    mark: str = ""
    backwards: bool = False


class Stamp(NamedTuple):
    """Which record of which state a release is of, the generation it was read from, the view, the digest of what went
    out, and what the models have in it; its `continual.json` says so."""

    state: str
    seq: int
    generation: object
    view: str = ""
    mark: str = ""
    shares: tuple[ReleasedShare, ...] | None = None


@dataclass(frozen=True, slots=True)
class Remote:
    """The branch as it is: its head (None where the repo or branch is empty), and what the `continual.json` in it says,
    if there is one of ours."""

    info: Info | None
    release: Stamp | None


def check(asked: ReleaseSettings, setting: str = "release.repo") -> None:
    """Raises Misconfigured for settings of a release that cannot be used. `setting` is the one that names the repo."""
    found = named(asked.repo or "")
    if asked.repo is not None and (found is None or found.revision or found.repo != asked.repo):
        raise Misconfigured(f"{setting} = {asked.repo}: write ORG/NAME")
    try:
        tag = (asked.tag or "{seq}").format(seq=1)
    except (KeyError, IndexError, ValueError):
        raise Misconfigured(f"release.tag = {asked.tag}: {{seq}} is all it can have in braces") from None
    if "{seq}" not in (asked.tag or "{seq}") or not _TAG.fullmatch(tag):
        raise Misconfigured(
            f"release.tag = {asked.tag}: a tag is letters, digits, '.', '_' and '-' with {{seq}} among them, "
            "so that each release has its own"
        )


def look(hub: Hub, asked: ReleaseSettings) -> Remote:
    """Asks what is on the branch. Raises Trouble, and Refuse where the repo is gated, or the Hub says of it what does
    not fit."""
    assert asked.repo is not None
    try:
        info = hub.info(asked.repo, asked.branch)
    except Refuse as error:
        if error.reason != "gone":
            raise
        return Remote(None, None)
    if RELEASE not in info.files or info.files[RELEASE].size > LARGEST_CONFIG:
        return Remote(info, None)
    return Remote(info, stamp_of(hub.small(asked.repo, info.sha, info.files[RELEASE])))


def stamp_of(body: bytes) -> Stamp | None:
    """What a `continual.json` says of a release; None if it is none of ours."""
    try:
        said = parse_fields(body)
    except Malformed:
        return None
    state, seq, generation = said.get("state"), said.get("seq"), said.get("generation")
    if not isinstance(state, str) or type(seq) is not int or not 0 <= seq < 1 << 53:
        return None
    view = said.get("view")
    name = view.get("name") if isinstance(view, dict) else None
    mark = said.get("mark")
    return Stamp(
        state,
        seq,
        generation if isinstance(generation, str) else None,
        name if isinstance(name, str) else "",
        mark if isinstance(mark, str) else "",
        shares_in(said),
    )


def may_follow(remote: Remote, asked: ReleaseSettings, ours: Ours) -> bool:
    """Whether our record is to be committed on top of what is there; False if it is out already, or the view reads the
    same as at the record that is. Where the settings say by now that something else goes out, it is committed again.

    Raises Misconfigured where the branch holds something else: releases of another state or view, a model that we did
    not make, a later record of this state, or a record that this state does not have, because a backup was restored
    since.
    """
    where = f"release.repo = {asked.repo}, branch {asked.branch}"
    if remote.release is None:
        files = remote.info.files if remote.info is not None else {}
        if "config.json" in files or any(name.endswith(_WEIGHTS) for name in files):
            raise Misconfigured(
                f"{where}: holds a model that continual did not make; name another repo or branch, or empty it first"
            )
        return True
    if remote.release.state != ours.state:
        raise Misconfigured(
            f"{where}: holds releases of another state ({remote.release.state[:12]}); one repo is for one state"
        )
    if remote.release.view != ours.view:
        held = f"the view {remote.release.view}" if remote.release.view else "the whole merge"
        raise Misconfigured(f"{where}: holds releases of {held}; one repo is for one view")
    there, seq, generations = remote.release.seq, ours.seq, ours.generations
    if there >= len(generations) or generations[there] != remote.release.generation:
        raise Misconfigured(
            f"{where}: holds record {there} of this state as it was before it was restored from a backup; "
            "name another repo"
        )
    if there > seq and not ours.backwards:
        raise Misconfigured(
            f"{where}: holds record {there} of this state, and releases go forward: "
            f"name another branch for record {seq}"
        )
    same = bool(ours.mark) and remote.release.mark == ours.mark
    if there == seq:
        return bool(ours.mark and remote.release.mark) and not same
    return not (ours.view and same)


def release(
    hub: Hub, asked: ReleaseSettings, ours: Ours, exported: Exported, texts: Callable[[Path], Mapping[str, bytes]]
) -> Released:
    """Publishes a record, unless it is out already, and tags it.

    `exported` gives the directory with the model; `texts` gets that directory and returns files, by name, that replace
    the ones in it. The repo and the branch are made where they are not there. Raises Misconfigured, Trouble, and Retry
    of the export. Nothing is ever half there: a commit is whole or not at all.
    """
    made, seq = _Made(mark=ours.mark), ours.seq
    with ExitStack() as stack:
        directory: Path | None = None
        while True:
            remote = look(hub, asked)
            if not may_follow(remote, asked, ours):
                assert remote.info is not None
                assert remote.release is not None
                there = remote.release
                made, seq = made._replace(commit=remote.info.sha, mark=there.mark, shares=there.shares), there.seq
                break
            if remote.info is None:
                remote = create(hub, asked)
            if directory is None:
                directory = stack.enter_context(exported())
            with readable(directory):
                said = texts(directory)
                changes = changes_to(directory, said, remote.info)
                operations = operations_of(changes)
            made = made._replace(uploaded=changes.nbytes, shares=shares_in(json.loads(said[RELEASE])))
            try:
                commit = _commit(hub, asked, operations, changes.nbytes, remote.info, f"Record {ours.seq}")
                made = made._replace(commit=commit, files=len(changes.adds), new=True)
                break
            except Trouble as error:  # the branch will tell whether the commit was made
                made = made._replace(tries=made.tries + 1)
                if made.tries == TRIES or error.fault in (Fault.TOKEN, Fault.DENIED, Fault.REQUEST):
                    raise
                hub.stop.wait(max(error.after, 0.5 * 2.0**made.tries))
    return _released(hub, asked, seq, made)


class _Made(NamedTuple):
    """How far a release is: failed `tries`, the `commit` that has it, and whether we made it; of that commit the number
    of `files` and the bytes `uploaded`. `mark`: what it is marked with; `shares`: what its models have in it."""

    tries: int = 0
    commit: str = ""
    new: bool = False
    files: int = 0
    uploaded: int = 0
    mark: str = ""
    shares: tuple[ReleasedShare, ...] | None = None


def _released(hub: Hub, asked: ReleaseSettings, seq: int, made: _Made) -> Released:
    """Tags a commit, where there are to be tags, and says what is out. Raises Misconfigured, Trouble."""
    repo = asked.repo or ""
    tag = (asked.tag or "").format(seq=seq) or None
    if tag is not None:
        tag = _tag(hub, repo, tag, made.commit, seq)
    return Released(
        repo=repo,
        branch=asked.branch,
        seq=seq,
        commit=made.commit,
        url=f"{hub.endpoint}/{repo}/tree/{made.commit}",
        tag=tag,
        new=made.new,
        uploaded=made.uploaded if made.new else 0,
        files=made.files,
        mark=made.mark or None,
        shares=made.shares,
    )


def _tag(hub: Hub, repo: str, tag: str, commit: str, seq: int) -> str:
    """Tags the release of record `seq`, and returns the tag: with a number behind it where the record was released
    before, in another form. Raises Misconfigured where the tag is there and of a commit that is none of these, and
    Trouble."""
    there = hub.tags(repo)
    names = (tag if n == 1 else f"{tag}-{n}" for n in count(1))
    found = next(name for name in names if there.get(name, commit) == commit or not _is_of(hub, repo, there[name], seq))
    what = f"tag {found} of {repo}"
    if there.get(found, commit) != commit:
        raise Misconfigured(f"{what}: is of another commit ({there[found][:12]}); remove it, or set release.tag")
    if found not in there:
        said = f"Record {seq}"
        hub.ask(what, lambda: hub.api.create_tag(repo, tag=found, revision=commit, tag_message=said, exist_ok=True))
    return found


def _is_of(hub: Hub, repo: str, commit: str, seq: int) -> bool:
    """Whether a commit is a release of record `seq`. Raises Trouble."""
    try:
        info = hub.info(repo, commit)
        stamp = stamp_of(hub.small(repo, commit, info.files[RELEASE])) if RELEASE in info.files else None
    except Refuse:
        return False
    return stamp is not None and stamp.seq == seq


def seconds_for(nbytes: int) -> float:
    """Seconds after which a commit of so many bytes has failed."""
    return _COMMIT_SECONDS + nbytes / _SLOWEST


def create(hub: Hub, asked: ReleaseSettings) -> Remote:
    """Makes the repo and the branch where they are not there, and looks at the branch. Raises Trouble."""
    repo = asked.repo or ""
    hub.ask(f"making {repo}", lambda: hub.api.create_repo(repo, private=asked.private, exist_ok=True))
    if asked.branch != "main":
        hub.ask(
            f"making branch {asked.branch} of {repo}",
            lambda: hub.api.create_branch(repo, branch=asked.branch, exist_ok=True),
        )
    return look(hub, asked)


def _commit(
    hub: Hub,
    asked: ReleaseSettings,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    nbytes: int,
    parent: Info | None,
    message: str,
) -> str:
    """Makes one commit of so many bytes on top of `parent`, or none, and returns its hash. Raises Trouble."""

    def create() -> str:
        made = hub.api.create_commit(
            asked.repo or "",
            list(operations),
            commit_message=message,
            revision=asked.branch,
            parent_commit=parent.sha if parent else None,
        )
        return str(made.oid)

    what = f"commit to {asked.repo}"
    seconds = seconds_for(nbytes)
    try:
        commit = hub.ask(what, create, tries=1, seconds=seconds)
    except Refuse as error:  # the repo went away meanwhile, or the token may not write there
        raise Trouble(str(error), Fault.GONE) from None
    if not is_sha(commit):
        raise Trouble(f"{what}: the Hub's answer names no commit", Fault.SERVER)
    return commit
