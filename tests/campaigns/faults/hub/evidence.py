"""What is judged after the campaign: records, fates, bits, secrets; and what is wrong with them."""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import continual
from continual import api, making
from continual.records import Totals
from tests.campaigns.faults.hub.lives import EMPTY, KINDS, NONE, READER, SECRET, World
from tests.helpers import hubs
from tests.loopback import TOKEN


@dataclass(frozen=True)
class Commit:
    """A commit that was published: under which names it was to be had, and whether it is the newest one of a repo that
    is there in the end."""

    life: str
    kind: str
    names: frozenset[str]
    sha: str
    empty: bool
    head: bool
    files: Mapping[str, bytes] = field(repr=False)


class Record(NamedTuple):
    """A settling record of the ledger."""

    seq: int
    key: str
    fate: str


@dataclass(frozen=True)
class Evidence:
    """All that `problems` judges: what was published, what the ledger says, what the daemon is known to have seen (and
    had not settled when it first was
    quiet: `lost`, for everything is pushed again afterwards), what it left behind."""

    commits: Sequence[Commit]
    records: Sequence[Record]
    seen: frozenset[str]
    lost: frozenset[str]
    code: int
    verify: Sequence[str]
    inbox: Sequence[str]
    secrets: Sequence[str]
    leaks: int
    log: str = field(repr=False)


def problems(found: Evidence) -> list[str]:
    """Every promise that was broken."""
    told: list[str] = []
    keys = Counter(record.key for record in found.records)
    told += [f"{key}: {count} settling records" for key, count in keys.items() if count > 1]
    known = {f"hub:{name}@{commit.sha}" for commit in found.commits for name in commit.names}
    told += [f"{key}: a record of what was never published" for key in keys if key not in known]
    fates: dict[str, list[str]] = defaultdict(list)
    for record in found.records:
        fates[record.key.rpartition("@")[2]].append(record.fate)
    taken: Counter[str] = Counter()
    lives: dict[str, str] = {}
    for commit in found.commits:
        kind, lives[commit.life] = KINDS[commit.kind], commit.kind
        allowed = kind.last if commit.head else kind.fates
        if commit.empty:
            allowed = EMPTY if commit.kind != "unrelated" else kind.fates
        got = fates.get(commit.sha, [])
        told += [
            f"{commit}: became {fate}, not {sorted(map(str, allowed))}" for fate in (got or NONE) if fate not in allowed
        ]
        wanted = (
            {f"hub:{name}@{commit.sha}" for name in commit.names}
            if not commit.empty and commit.kind != "unrelated"
            else set()
        )
        told += [f"{commit}: was seen and has no fate"] if wanted & found.seen and not got else []
        told += [f"{commit}: was seen and was lost, until it was pushed again"] if wanted & found.lost and got else []
        taken[commit.life] += got.count("folded")
    told += [
        f"{life} ({kind}): {taken[life]} of its commits are folded"
        for life, kind in lives.items()
        if taken[life] > 1 + (kind == "reborn") or KINDS[kind].taken not in (None, taken[life])
    ]
    told += [f"the daemon ended with {found.code}"] if found.code else []
    told += [f"verify: {line}" for line in found.verify]
    told += [f"inbox: {name} is left" for name in found.inbox]
    told += [f"a secret in {place}" for place in found.secrets]
    told += [f"{found.leaks} requests to the CDN bore a token"] if found.leaks else []
    told += ["the log has a traceback"] if "Traceback" in found.log else []
    return told


def published(world: World, kinds: Mapping[str, str]) -> list[Commit]:
    """Every commit ever made on the Hub but the base's, from its history."""
    hub, names, repos = world.hub, defaultdict(set), {}
    for repo in [change.repo for change in hub.changes] + list(hub.state().values()):
        for sha in repo.commits:
            names[sha].add(repo.id)
            repos[sha] = repo
    heads = {repo.branches["main"] for repo in hub.state().values()}
    made = []
    for sha, repo in repos.items():
        if repo.id in world.lives:
            commit, life = repo.commits[sha], world.lives[repo.id]
            files = {path: blob.data for path, blob in commit.files.items()}
            made.append(
                Commit(life, kinds[life], frozenset(names[sha]), sha, commit.parent is None, sha in heads, files)
            )
    return made


def records(state: Path) -> list[Record]:
    with continual.open(state) as merge:
        return [
            Record(c.seq, c.entry.candidate.key, c.entry.reason or str(c.entry.fate))
            for c in merge.state.ledger.log
            if c.entry.candidate and c.entry.kind in ("fold", "refuse")
        ]


SECRETS = re.compile(b"|".join([*(re.escape(word.encode()) for word in (READER, TOKEN, SECRET)), rb"sig=[0-9a-f]{8}"]))


def secrets(places: Sequence[Path]) -> list[str]:
    """Files that have a token, the webhooks' secret or a signed link in them."""
    files = [
        file
        for place in places
        for file in ([place] if place.is_file() else sorted(place.rglob("*")))
        if file.is_file()
    ]
    return [str(file) for file in files if SECRETS.search(file.read_bytes())]


class Bits(NamedTuple):
    """A merge: its accumulators, the rule's totals, and the digests of what was folded."""

    sums: Mapping[str, np.ndarray]
    totals: Totals
    digests: Sequence[str | None]

    def same(self, other: Bits) -> bool:
        return self.equal(other) and self.totals == other.totals and list(self.digests) == list(other.digests)

    def equal(self, other: Bits) -> bool:
        return hubs.equal(self.sums, other.sums)


def bits(merge: api.Merge) -> Bits:
    return Bits(hubs.sums(merge), merge.state.ledger.totals, [c.entry.digest for c in merge.state.ledger.folds()])


def offline(work: Path, world: World, rule: str, commits: Sequence[Commit]) -> Bits:
    """Folds commits in this order out of folders into a new state, in a directory that is not there."""
    work.mkdir()
    making.init(world.base, work / "state", making.Recipe(rule=rule))
    with continual.open(work / "state", write=True) as merge:
        for commit in commits:
            for path, data in commit.files.items():
                file = work / commit.sha / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            outcome = merge.fold(work / commit.sha)
            assert outcome.fate == "folded", outcome.message
        found = bits(merge)
    shutil.rmtree(work)
    return found
