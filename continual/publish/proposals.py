"""Pull requests on the Hub that propose a release: opened, asked for, merged and closed. Which record a request is of
is said by the `continual.json` in it, as of a release, where the account that we ask with has opened it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from continual.config import ReleaseSettings
from continual.errors import Misconfigured, Refuse
from continual.hub import Hub, Trouble
from continual.hub.names import is_sha
from continual.publish import hub as releases
from continual.publish.changes import changes_to, operations_of, readable
from continual.publish.hub import Exported, Ours, Released, Stamp
from continual.publish.provenance import shares_in
from continual.retrying import Fault
from continual.tensors.checkpoints.place import RELEASE

_T = TypeVar("_T")
MOST = 200
"""Open pull requests of a repo that are looked at, the newest first."""
LONGEST = 60_000
"""Characters of a description."""
_REF = re.compile(r"refs/pr/([1-9][0-9]{0,8})")


class ProposalState(NamedTuple):
    """How it stands with a pull request, and the commit that merged it."""

    status: Literal["open", "merged", "closed"]
    merged: str | None = None


def ref_of(number: int) -> str:
    """The name of a pull request's branch."""
    return f"refs/pr/{number}"


def number_of(ref: str) -> int | None:
    """The number of the pull request whose branch this is; None if it is none."""
    found = _REF.fullmatch(ref)
    return None if found is None else int(found[1])


def propose(
    hub: Hub,
    asked: ReleaseSettings,
    ours: Ours,
    exported: Exported,
    texts: Callable[[Path], Mapping[str, bytes]],
    report: str,
) -> Released:
    """Opens a pull request to `main`, unless one for the same is open; `branch` of what is returned is that of the
    request. Other open ones of this state and view are closed. `report`: what its description says; the rest is as of
    `publish.hub.release`. Raises Misconfigured, Trouble and Retry."""
    tries = 0
    while True:
        try:
            return _propose(hub, asked, ours, exported, texts, report)
        except Trouble as error:  # what is open there will tell whether it was opened
            tries += 1
            if tries == releases.TRIES or error.fault in (Fault.TOKEN, Fault.DENIED, Fault.REQUEST):
                raise
            hub.stop.wait(max(error.after, 0.5 * 2.0**tries))


def _propose(
    hub: Hub,
    asked: ReleaseSettings,
    ours: Ours,
    exported: Exported,
    texts: Callable[[Path], Mapping[str, bytes]],
    report: str,
) -> Released:
    repo = asked.repo or ""
    main = releases.look(hub, asked)
    if main.info is None:
        main = releases.create(hub, asked)
    if not releases.may_follow(main, asked, ours):
        raise Misconfigured(f"{repo}: record {ours.seq} is on {asked.branch} already, so there is nothing to propose")
    for number, stamp in opened(hub, repo, ours).items():
        if (stamp.seq, stamp.mark) == (ours.seq, ours.mark):
            return _proposed(hub, repo, ours, number, hub.info(repo, ref_of(number)).sha)
        close(hub, repo, number, f"Record {ours.seq} takes its place.")
    with exported() as directory, readable(directory):
        said = texts(directory)
        changes = changes_to(directory, said, main.info)
        operations = operations_of(changes)

        def create() -> tuple[str, int]:
            made = hub.api.create_commit(
                repo,
                list(operations),
                commit_message=_title(ours),
                commit_description=report[:LONGEST],
                parent_commit=main.info.sha if main.info else None,
                create_pr=True,
            )
            return str(made.oid), int(made.pr_num or 0)

        commit, number = _asked(hub, f"pull request to {repo}", create, releases.seconds_for(changes.nbytes))
    if not is_sha(commit) or number < 1:
        raise Trouble(f"pull request to {repo}: the Hub's answer names none", Fault.SERVER)
    found = _proposed(hub, repo, ours, number, commit)
    shares = shares_in(json.loads(said[RELEASE]))
    return replace(found, new=True, files=len(changes.adds), uploaded=changes.nbytes, shares=shares)


def opened(hub: Hub, repo: str, ours: Ours) -> dict[int, Stamp]:
    """The open pull requests of this state and view, by their numbers, the newest first. Raises Trouble."""

    def listed() -> list[tuple[int, str, str]]:
        found = hub.api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open")
        return [(one.num, one.title, one.author) for one in islice(found, MOST) if one.title.startswith("Record ")]

    stamps: dict[int, Stamp] = {}
    seen = _asked(hub, f"pull requests of {repo}", listed)
    me = _asked(hub, "the account of the token", lambda: str(hub.api.whoami()["name"])) if seen else ""
    for number, title, author in seen:
        if author != me:  # anybody may open one with our title and continual.json, and other weights
            continue
        try:
            info = hub.info(repo, ref_of(number))
            stamp = releases.stamp_of(hub.small(repo, info.sha, info.files[RELEASE])) if RELEASE in info.files else None
        except Refuse:  # it is gone, or what it holds does not fit: none of ours
            continue
        # one of somebody else is on top of a release of ours, and has its continual.json, but not this title
        if stamp is not None and stamp.state == ours.state and title == _title(replace(ours, seq=stamp.seq)):
            stamps[number] = stamp
    return stamps


def standing(hub: Hub, repo: str, number: int) -> ProposalState:
    """Whether a pull request is open, merged or closed. Raises Trouble."""

    def asked() -> tuple[str, str | None]:
        found = hub.api.get_discussion_details(repo, number)
        return found.status, found.merge_commit_oid

    status, merged = _asked(hub, f"pull request {number} of {repo}", asked)
    if status == "merged":
        return ProposalState("merged", merged)
    return ProposalState("closed" if status == "closed" else "open")


def merge(hub: Hub, repo: str, number: int) -> None:
    """Merges a pull request that is open. Raises Trouble, also where it conflicts with what is there by now."""
    if standing(hub, repo, number).status == "open":
        _asked(hub, f"merging pull request {number} of {repo}", lambda: hub.api.merge_pull_request(repo, number))


def close(hub: Hub, repo: str, number: int, why: str) -> None:
    """Closes a pull request, and says why. Raises Trouble."""
    if standing(hub, repo, number).status == "open":
        _asked(
            hub,
            f"closing pull request {number} of {repo}",
            lambda: hub.api.change_discussion_status(repo, number, "closed", comment=why),
        )


def _asked(hub: Hub, what: str, call: Callable[[], _T], seconds: float = 60.0) -> _T:
    """One request, or a listing. Raises Trouble, also where the repo is gone or the token may not."""
    try:
        return hub.ask(what, call, tries=1, seconds=seconds)
    except Refuse as error:
        raise Trouble(str(error), Fault.GONE) from None


def _title(ours: Ours) -> str:
    of = f" of the view {ours.view}" if ours.view else ""
    return f"Record {ours.seq}{of}, state {ours.state[:12]}"


def _proposed(hub: Hub, repo: str, ours: Ours, number: int, commit: str) -> Released:
    url = f"{hub.endpoint}/{repo}/discussions/{number}"
    return Released(repo, ref_of(number), ours.seq, commit, url, None, new=False, mark=ours.mark or None)
