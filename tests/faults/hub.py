"""The campaign on the Hub: a daemon that is killed again and again follows a Hub that fails, while all kinds of repos are published there with the real client.

    python -m tests.faults.hub --repos 30 --kills 5 --seed 0

The Hub is the one of tests/hub: it answers with errors, drops and slow bodies, its lists are stale, its webhooks are doubled, mixed and lost. Repos live their
lives in random order (`KINDS`); the daemon dies at random instants of a fold, a poll, a look, a commit, a push, or at any time. Faults end only when all is
settled, for two last polls. Then everything is judged against what was published, by `problems`: one settled fate for each (repo, commit) and the right
one; and the state is bit-equal to one into which the accepted commits were folded from folders, in the ledger's order. Each run also shows that these
checks can fail, on altered data.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, httpx

import continual
from continual import api
from continual.state import framing
from tests import hubs, models
from tests.hub import TOKEN, Account, Deliveries, Hub, Request, environment, online, serving
from tests.hub import faults as wrong
from tests.hubs import BASE
from tests.services import daemon, status

READER = "hf_the_daemon_of_the_campaign"
SECRET = "the-secret-of-the-campaign"
SETTLED = ("folded", "duplicate")
RULES = ("iso-c", "opcm", "task-arithmetic")
SHAPES = {
    "model.embed_tokens.weight": (60, 64),
    **{f"model.layers.{n}.self_attn.q_proj.weight": (64, 64) for n in range(2)},
    **{f"model.layers.{n}.mlp.up_proj.weight": (160, 64) for n in range(2)},
    **{f"model.layers.{n}.input_layernorm.weight": (64,) for n in range(2)},
    "model.norm.weight": (64,),
}
MOMENTS = ("fold", "poll", "look", "push", "commit", "time")
"""When the daemon is killed: as it asks for weights, a list or a repo, after it accepted a push, after a record came to be, or at any time."""


# What is published, and what may become of it


class World:
    """The Hub, a publisher with the real client, and what the ledger says so far."""

    def __init__(self, work: Path, hub: Hub, draw: random.Random) -> None:
        self.work, self.hub, self.draw = work, hub, draw
        self.api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        self.base = models.base(work / "base", shapes=SHAPES)
        self.lives: dict[str, str] = {}
        """The name of every repo, old ones too, and the life it belongs to."""
        self.fates: dict[str, str] = {}
        """By commit; the watcher fills it."""
        self._made = 0

    def tuned(self, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
        """Another fine-tune."""
        self._made += 1
        return models.fine_tune(self.base, self.work / f"models/{self._made}", self._made, change=change)

    def sharded(self) -> Path:
        tuned = self.tuned()
        return hubs.sharded(tuned, tuned.with_name(f"{tuned.name}-sharded"))

    def adapter(self) -> Path:
        self._made += 1
        (self.work / "models").mkdir(exist_ok=True)
        return hubs.adapter(self.base, self.work / f"models/{self._made}", self._made)

    def create(self, repo: str, *, private: bool = False) -> None:
        self.lives.setdefault(repo, repo)
        insist(lambda: self.api.create_repo(repo, private=private, exist_ok=True))

    def commit(self, repo: str, directory: Path | None, readme: bytes | None = None) -> None:
        """One commit of a model directory and a card."""
        files = {} if directory is None else hubs.files_of(directory)
        files["README.md"] = hubs.card(note=self.draw.random()) if readme is None else readme
        parent = self.hub.head(repo)

        def commit() -> None:
            operations = [CommitOperationAdd(path, io.BytesIO(data)) for path, data in files.items()]
            self.api.create_commit(repo, operations, commit_message="A commit", parent_commit=parent)

        insist(commit, lambda: self.hub.head(repo) != parent)

    def publish(self, repo: str, directory: Path, readme: bytes | None = None, **how: Any) -> Life:
        self.create(repo, **how)
        yield
        self.commit(repo, directory, readme)

    def fated(self, repo: str) -> Callable[[], bool]:
        head = self.hub.head(repo)
        return lambda: head in self.fates


Life = Iterator[Callable[[], bool] | None]
"""What happens to a repo, step by step; goes on once what it yields is true."""


def insist(call: Callable[[], Any], happened: Callable[[], bool] = lambda: False) -> None:
    """Calls until it succeeds, or until what it was for has happened although it failed."""
    for attempt in range(30):
        try:
            call()
            return
        except (HfHubHTTPError, httpx.HTTPError, OSError):
            if happened():
                return
            if attempt == 29:
                raise
            time.sleep(0.05)


def full(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.tuned())


def sharded(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.sharded())


def adapter(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.adapter())


def gated(w: World, repo: str, *, admitted: bool) -> Life:
    w.create(repo)
    insist(lambda: w.api.update_repo_settings(repo, gated="manual"))
    if admitted:
        w.hub.admit(READER, repo)
    yield
    w.commit(repo, w.tuned())


def private(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.tuned(), private=True)


def wrong_base(w: World, repo: str) -> Life:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)

    yield from w.publish(repo, w.tuned(other))


def not_a_number(w: World, repo: str) -> Life:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = math.nan

    yield from w.publish(repo, w.tuned(spoil))


def pickle(w: World, repo: str) -> Life:
    w.create(repo)
    yield
    directory = w.work / f"models/{repo.replace('/', '-')}"
    directory.mkdir(parents=True)
    (directory / "pytorch_model.bin").write_bytes(w.draw.randbytes(50_000))
    (directory / "config.json").write_text("{}")
    w.commit(repo, directory)


def unrelated(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.tuned(), hubs.card(None, license="mit"))
    yield
    w.commit(repo, None, hubs.card("org/another"))


def soon(w: World, repo: str) -> Life:
    """Weights follow weights, mostly before the first were looked at."""
    yield from w.publish(repo, w.tuned())
    for _ in range(w.draw.randint(1, 2)):
        if w.draw.random() < 0.5:
            yield
        w.commit(repo, w.tuned())


def later(w: World, repo: str) -> Life:
    """Weights follow weights that are folded."""
    yield from w.publish(repo, w.tuned())
    yield w.fated(repo)
    w.commit(repo, w.tuned())


def card(w: World, repo: str) -> Life:
    """Another card follows, at any time."""
    yield from w.publish(repo, w.tuned())
    yield
    w.commit(repo, None)


def deleted(w: World, repo: str) -> Life:
    """At any time."""
    yield from w.publish(repo, w.tuned())
    for _ in range(w.draw.randint(0, 3)):
        yield
    insist(lambda: w.api.delete_repo(repo, missing_ok=True))


def deleted_later(w: World, repo: str) -> Life:
    """Once it is folded."""
    yield from w.publish(repo, w.tuned())
    yield w.fated(repo)
    insist(lambda: w.api.delete_repo(repo, missing_ok=True))


def reborn(w: World, repo: str) -> Life:
    """Deleted, and made anew with other weights."""
    yield from deleted(w, repo)
    yield
    yield from w.publish(repo, w.tuned())


def renamed(w: World, repo: str) -> Life:
    """At any time."""
    yield from w.publish(repo, w.tuned())
    for _ in range(w.draw.randint(0, 3)):
        yield
    w.lives[f"{repo}-renamed"] = repo
    insist(lambda: w.api.move_repo(repo, f"{repo}-renamed"), lambda: f"{repo}-renamed" in w.hub.state())


def copied(w: World, repo: str) -> Life:
    """The same weights under two names."""
    tuned = w.tuned()
    yield from w.publish(repo, tuned)
    yield
    yield from w.publish(f"{repo}-copy", tuned)


class Kind(NamedTuple):
    """How repos of a kind live, what may become of their commits, of the last one if it is there in the end, and how many of their weights go in:
    None where that is left to chance."""

    live: Callable[[World, str], Life]
    fates: frozenset[str | None]
    last: frozenset[str | None]
    taken: int | None


def kind(live: Callable[[World, str], Life], *fates: str | None, last: Sequence[str | None] = (), taken: int | None = None) -> Kind:
    return Kind(live, frozenset(fates), frozenset(last or fates), taken)


KINDS: Mapping[str, Kind] = {
    "full": kind(full, "folded", taken=1),
    "sharded": kind(sharded, "folded", taken=1),
    "adapter": kind(adapter, "folded", taken=1),
    "soon": kind(soon, "folded", "superseded", "update", None, last=("folded", "update"), taken=1),
    "deleted": kind(deleted, "folded", "gone", None),
    "later": kind(later, "folded", "update", last=("update",), taken=1),
    "unrelated": kind(unrelated, None),
    "card": kind(card, "folded", "superseded", "update", None, last=("folded", "update"), taken=1),
    "wrong-base": kind(wrong_base, "shape", taken=0),
    "copied": kind(copied, "folded", "duplicate", taken=1),
    "gated-out": kind(lambda w, repo: gated(w, repo, admitted=False), "gated", taken=0),
    "gated-in": kind(lambda w, repo: gated(w, repo, admitted=True), "folded", taken=1),
    "renamed": kind(renamed, "folded", "duplicate", None, last=("folded", "duplicate"), taken=1),
    "reborn": kind(reborn, "folded", "superseded", "gone", "update", None, last=("folded", "update")),
    "private-ours": kind(private, "folded", taken=1),
    "private-theirs": kind(private, "gone", None, taken=0),
    "pickle": kind(pickle, "pickle", taken=0),
    "not-a-number": kind(not_a_number, "non-finite", taken=0),
    "deleted-later": kind(deleted_later, "folded", taken=1),
}
EMPTY: frozenset[str | None] = frozenset(("superseded", "gone", None))
"""What may become of the commit with which a repo begins: it has no card yet, so it is left out, unless there is another by then."""


# The daemon, and its end


class Watcher:
    """Follows the state's files from outside: fates into `world.fates`, and every key that the cursor ever held; and kills when armed."""

    def __init__(self, world: World, state: Path, deliveries: Deliveries) -> None:
        self.world, self.state, self.deliveries = world, state, deliveries
        self.seen: set[str] = set()
        self.pid = 0
        self.killed = threading.Event()
        self.fell: Counter[str] = Counter()
        self._armed, self._skip, self._until = "", 0, math.inf
        self._records, self._pushes = 0, 0
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self.world.hub.on_request = self._heard
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.world.hub.on_request = None

    def arm(self, moment: str, skip: int, patience: float) -> None:
        """Kills at the next such moment after `skip` others, at the latest in `patience` seconds."""
        with self._lock:
            self._armed, self._skip, self._until = moment, skip, time.monotonic() + patience

    @property
    def armed(self) -> bool:
        return bool(self._armed)

    def _strikes(self, moment: str) -> None:
        with self._lock:
            if self._armed != moment and moment != "time":
                return
            if moment != "time" and self._skip > 0:
                self._skip -= 1
                return
            self._armed, self._until = "", math.inf
        os.kill(self.pid, signal.SIGKILL)
        self.fell[moment] += 1
        self.killed.set()

    def _heard(self, request: Request) -> None:
        if whose(request) == "daemon" and self._armed:
            self._strikes("fold" if request.origin == "cdn" else "poll" if request.listing else "look")

    def _run(self) -> None:
        while not self._end.wait(0.002 if self._armed == "commit" else 0.02):
            if time.monotonic() >= self._until:
                self._strikes("time")
            pushes = sum(accepted(status) for _, _, status in self.deliveries.sent)
            if pushes > self._pushes and self._armed:
                self._strikes("push")
            self._pushes = pushes
            self.look()

    def look(self) -> None:
        """Takes what is new in the state."""
        while (file := self.state / f"commits/{self._records:08d}.json").exists():
            body = framing.decode(file)[0]
            self._records += 1
            if body["candidate"] and body["kind"] in ("fold", "refuse"):
                self.world.fates[body["candidate"]["key"].rpartition("@")[2]] = body["reason"] or body["fate"]
            if self._armed:
                self._strikes("commit")
        if (cursor := self.state / "sources/hub.json").exists():
            self.seen |= {f"hub:{row[0]}@{row[1]}" for row in framing.decode(cursor)[0]["seen"] if row[1]}


def accepted(status: int | None) -> bool:
    return status == 202


def whose(request: Request) -> str:
    """Who asks: the daemon, the publisher, or somebody before the campaign begins."""
    if request.origin == "cdn":
        return "daemon" if request.method == "GET" else "publisher"
    return {f"Bearer {READER}": "daemon", f"Bearer {TOKEN}": "publisher"}.get(request.headers.get("authorization", ""), "nobody")


def policy(seed: int, rate: float) -> wrong.Policy:
    """Faults for both, stale lists besides for the daemon."""
    reading = wrong.either(wrong.Random(seed, rate), wrong.Random(seed + 1, 2 * rate, kinds=[wrong.Stale(n) for n in (1, 2, 4, 8)]))
    writing = wrong.Random(seed + 2, rate / 2, kinds=[wrong.unavailable(), wrong.broken(), wrong.Drop(), wrong.too_many(0)])

    def decide(request: Request) -> wrong.Fault | None:
        if whose(request) == "daemon":
            fault = reading(request)
            return None if isinstance(fault, wrong.Stale) and not request.listing else fault
        return writing(request) if whose(request) == "publisher" and request.origin == "api" else None

    return decide


class Service:
    """The daemon on a state, killed and started again."""

    def __init__(self, world: World, watcher: Watcher, state: Path) -> None:
        self.state = state
        self._world, self._watcher = world, watcher
        self._environment = environment(world.hub, world.work, token=READER) | {"CONTINUAL_WEBHOOK_SECRET": SECRET}
        self._flags = [f"--hub={pair}" for pair in ("watch=true", f"bases={BASE}", "poll=0.5", "settle=0.3", "sweep=4")]
        self._stack = ExitStack()

    def start(self) -> None:
        self.url: str | None = None
        self.process = self._stack.enter_context(daemon(self.state, None, *self._flags, environment=self._environment))
        self._watcher.pid = self.process.pid

    def alive(self) -> bool:
        """Whether it listens; webhooks are sent there from now on. One that was killed is started again, one that ended otherwise an error."""
        if self._watcher.killed.is_set():
            assert self.process.wait() == -signal.SIGKILL
            self._stack.close()
            self._world.hub.webhooks.clear()
            self._watcher.killed.clear()
            self.start()
        assert self.process.poll() is None or self._watcher.killed.is_set(), (
            f"the daemon ended with {self.process.returncode}\n{self.log()}"
        )
        if self.url is None:
            text = (self.state / "lock").read_text()
            held = json.loads(text[text.index("{") :]) if "{" in text and text.rstrip().endswith("}") else {}
            if held.get("pid") == self.process.pid and held.get("url"):
                self.url = held["url"]
                self._world.hub.webhooks[:] = [(f"{self.url}/webhook", SECRET)]
        return self.url is not None

    def status(self) -> dict[str, Any] | None:
        if self.url is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            return status(self.url)
        return None

    def log(self, lines: int = 25) -> str:
        return "\n".join((self.state.parent / "daemon.log").read_text().splitlines()[-lines:])

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        self._stack.close()
        return code

    def close(self) -> None:
        self._stack.close()


# What was found


@dataclass(frozen=True)
class Commit:
    """A commit that was published: under which names it was to be had, and whether it is the newest one of a repo that is there in the end."""

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
    """All that `problems` judges: what was published, what the ledger says, what the daemon is known to have seen, what it left behind."""

    commits: Sequence[Commit]
    records: Sequence[Record]
    seen: frozenset[str]
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
            allowed = EMPTY if commit.kind != "unrelated" else frozenset([None])
        got = fates.get(commit.sha, [])
        told += [f"{commit}: became {fate}, not {sorted(map(str, allowed))}" for fate in got or [None] if fate not in allowed]
        if not got and not commit.empty and commit.kind != "unrelated" and any(f"hub:{n}@{commit.sha}" in found.seen for n in commit.names):
            told.append(f"{commit}: was seen and has no fate")
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
            made.append(Commit(life, kinds[life], frozenset(names[sha]), sha, commit.parent is None, sha in heads, files))
    return made


def records(state: Path) -> list[Record]:
    with continual.open(state) as merge:
        return [
            Record(c.seq, c.entry.candidate["key"], c.entry.reason or str(c.entry.fate))
            for c in merge.state.log
            if c.entry.candidate and c.entry.kind in ("fold", "refuse")
        ]


SECRETS = re.compile(b"|".join([*(re.escape(word.encode()) for word in (READER, TOKEN, SECRET)), rb"[?&]sig=", rb"sig=[0-9a-f]{16}"]))


def secrets(places: Sequence[Path]) -> list[str]:
    """Files that have a token, the webhooks' secret or a signed link in them."""
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*"))) if file.is_file()]
    return [str(file) for file in files if SECRETS.search(file.read_bytes())]


class Bits(NamedTuple):
    """A merge: its accumulators, the rule's totals, and the digests of what was folded."""

    sums: Mapping[str, np.ndarray]
    totals: Mapping[str, float]
    digests: Sequence[str | None]

    def same(self, other: Bits) -> bool:
        return hubs.equal(self.sums, other.sums) and self.totals == other.totals and list(self.digests) == list(other.digests)


def bits(merge: api.Merge) -> Bits:
    return Bits(hubs.sums(merge), dict(merge.state.totals), [c.entry.digest for c in merge.state.folds()])


def offline(work: Path, world: World, rule: str, commits: Sequence[Commit]) -> Bits:
    """Folds commits in this order out of folders into a new state, in a directory that is not there."""
    work.mkdir()
    api.init(world.base, work / "state", api.Asked(rule=rule))
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


# The campaign


@dataclass(frozen=True)
class Result:
    """What a campaign found."""

    evidence: Evidence
    told: Sequence[str]
    summary: Mapping[str, Any]


def campaign(
    work: Path,
    repos: int,
    kills: int,
    seed: int,
    *,
    rule: str = "iso-c",
    rate: float = 0.12,
    limit: float = 600.0,
    base_from_hub: bool = True,
) -> Result:
    """Runs a campaign in `work`; `told` of the result is empty where every promise was kept. Raises AssertionError if it gets stuck for `limit` seconds."""
    begun, draw = time.monotonic(), random.Random(seed)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    work.mkdir(parents=True, exist_ok=True)
    start = time.time()
    # a Hub whose clock runs fast, with ties: so that lists are not read to their end
    hub = Hub(clock=lambda: start + (time.time() - start) * 60 // 20 * 20, page_size=7)
    hub.tokens[READER] = Account("daemon", orgs=frozenset({"ours"}))
    state = work / "state"
    with ExitStack() as stack:
        stack.enter_context(online())
        stack.enter_context(serving(hub))
        world = World(work, hub, draw)
        hubs.publish(hub, BASE, world.base, hubs.card(None, license="apache-2.0"))
        if base_from_hub:
            command = [sys.executable, "-m", "continual", "init", BASE, "--state", str(state), "--rule", rule]
            subprocess.run(command, check=True, env=environment(hub, work, token=READER), stdout=subprocess.DEVNULL)
        else:
            api.init(world.base, state, api.Asked(rule=rule))
        deliveries = stack.enter_context(Deliveries(hub, seed=seed, duplicate=0.3, drop=0.2, shuffle=True, attempts=3))
        watcher = stack.enter_context(Watcher(world, state, deliveries))
        service = Service(world, watcher, state)
        stack.callback(service.close)
        hub.faults = policy(seed, rate)
        service.start()
        kinds = live(world, watcher, service, repos, kills, begun + limit)
        after = time.monotonic()
        deliveries.settle()
        quiet(world, kinds, service, begun + limit)
        # everything once more, late and out of order
        again = [(change, status) for change in draw.sample(hub.changes, len(hub.changes)) for status in hub.deliver(change)]
        quiet(world, kinds, service, begun + limit)
        hub.faults = None
        listings = len(hub.journal.find("^/api/models$"))
        wait(lambda: len(hub.journal.find("^/api/models$")) >= listings + 8, service, begun + limit, "two more polls")
        quiet(world, kinds, service, begun + limit)
        code = service.stop()
        watcher.look()
        requests = list(hub.journal)
    commits = published(world, kinds)
    with continual.open(state) as merge:
        verify, ours = merge.state.verify(), bits(merge)
    told_of = again + [(change, status) for _, change, status in deliveries.sent]
    pushed = {f"hub:{change.repo.id}@{new}" for change, status in told_of if accepted(status) for _, _, new in change.refs if new}
    evidence = Evidence(
        commits=commits,
        records=records(state),
        seen=frozenset(watcher.seen | pushed),
        code=code,
        verify=verify,
        inbox=[file.name for file in (state / "inbox").iterdir()] if (state / "inbox").exists() else [],
        secrets=secrets([state, work / "daemon.log"]),
        leaks=len(hub.journal.leaks()),
        log=(work / "daemon.log").read_text(),
    )
    by_sha = {commit.sha: commit for commit in commits}
    folded = [by_sha[r.key.rpartition("@")[2]] for r in evidence.records if r.fate == "folded"]
    told = problems(evidence)
    if not ours.same(offline(work / "offline", world, rule, folded)):
        told.append("the state is not that of the accepted commits folded from folders")
    told += [f"negative control: {name} was not noticed" for name, noticed in controls(evidence).items() if not noticed]
    if len(folded) > 1:
        left_out = offline(work / "left-out", world, rule, folded[:-2] + folded[-1:])
        told += ["negative control: a fold that was left out was not noticed"] if ours.same(left_out) else []
        swapped = offline(work / "swapped", world, rule, [*folded[:-2], folded[-1], folded[-2]])
        told += ["negative control: two folds that were swapped were not noticed"] if ours.same(swapped) else []
    if watcher.fell.total() != kills:
        told.append(f"{watcher.fell.total()} kills, not {kills}")
    summary = {
        "seed": seed,
        "rule": rule,
        "repos": repos,
        "kinds": Counter(kinds.values()),
        "commits": len(commits),
        "kills": {"total": watcher.fell.total(), **watcher.fell},
        "faults": Counter(f"{whose(r)}: {label(r)}" for r in requests if r.fault is not None),
        "requests": Counter(whose(r) for r in requests),
        "deliveries": Counter("nobody answered" if status is None else str(status) for _, status in told_of),
        "records": len(evidence.records),
        "fates": Counter(r.fate for r in evidence.records),
        "seen": len(evidence.seen),
        "retries": evidence.log.count('"event": "retry"'),
        "polls that failed": evidence.log.count('"event": "poll failed"'),
        "seconds": {"all": round(time.monotonic() - begun, 1), "until all was published": round(after - begun, 1)},
    }
    return Result(evidence, told, summary)


def live(world: World, watcher: Watcher, service: Service, repos: int, kills: int, end: float) -> dict[str, str]:
    """Lets repos live their lives, step by step in random order, and the daemon die; the kind of each."""
    draw, kinds, lives = world.draw, dict[str, str](), dict[str, Life]()
    names = (list(KINDS) * (repos // len(KINDS) + 1))[:repos]
    for number, name in enumerate(names):
        repo = f"{'ours' if name == 'private-ours' else draw.choice(('org', 'people', 'lab'))}/{name}-{number}"
        kinds[repo] = name
        lives[repo] = KINDS[name].live(world, repo)
    waits: dict[str, Callable[[], bool] | None] = dict.fromkeys(kinds)
    moments = [MOMENTS[n % len(MOMENTS)] for n in range(draw.randrange(len(MOMENTS)), len(MOMENTS) * 100)][:kills]
    draw.shuffle(moments)
    total, due = 3 * repos, 0
    steps = 0
    while lives or moments or watcher.armed:
        assert time.monotonic() < end, f"stuck: {list(lives)}, {moments} to come\n{service.log()}"
        listens = service.alive()
        if listens and moments and not watcher.armed and (steps >= total * (due + 0.3) / kills or not lives):
            due += 1
            watcher.arm(moments.pop(0), draw.randrange(4), draw.uniform(1.0, 4.0))
        if not due and not listens and steps >= total // 5:  # the rest is published before its eyes
            time.sleep(0.05)
            continue
        ready = [repo for repo, wait in waits.items() if wait is None or wait()]
        if not ready:
            time.sleep(0.05)
            continue
        repo = draw.choice(ready)
        steps += 1
        try:
            waits[repo] = next(lives[repo])
        except StopIteration:
            del waits[repo], lives[repo]
        time.sleep(draw.choice((0.0, 0.0, 0.05, 0.2)))
    service.alive()
    world.lives |= {f"{repo}-copy": repo for repo, name in kinds.items() if name == "copied"}
    return kinds


def wait(done: Callable[[], bool], service: Service, end: float, what: str) -> None:
    while not (service.alive() and done()):
        assert time.monotonic() < end, f"stuck, waiting for {what}\n{service.log()}"
        time.sleep(0.1)


def quiet(world: World, kinds: Mapping[str, str], service: Service, end: float) -> None:
    """Waits until nothing is left to do: every head that is to have a fate has one, no push waits, the queue is empty."""

    def open_heads() -> list[str]:
        heads = {name: repo.branches["main"] for name, repo in world.hub.state().items() if name in world.lives}
        return [n for n, sha in heads.items() if None not in KINDS[kinds[world.lives[n]]].last and sha not in world.fates]

    def done() -> bool:
        if open_heads() or any((service.state / "inbox").glob("*.json")):
            return False
        body = service.status()
        return body is not None and not body["queued"] and body["current"] is None and not body["hub"]["seen"]

    try:
        wait(done, service, end, "quiet")
    except AssertionError as error:
        left = sorted(file.name for file in (service.state / "inbox").glob("*.json"))
        raise AssertionError(f"open: {open_heads()}, inbox: {left}, status: {service.status()}\n{error}") from None


def label(request: Request) -> str:
    fault = request.fault
    return f"{fault.status}" if isinstance(fault, wrong.Status) else type(fault).__name__.lower()


def controls(found: Evidence) -> dict[str, bool]:
    """Whether `problems` notices what it has to, on altered evidence."""
    one = next(r for r in found.records if r.fate == "folded")
    head = next(c for c in found.commits if c.head and KINDS[c.kind].taken)
    stranger = next((c for c in found.commits if c.kind == "unrelated" and not c.empty), None)
    altered = {
        "a second record of a key": {"records": [*found.records, one._replace(seq=10_000)]},
        "a lost record": {"records": [r for r in found.records if not r.key.endswith(head.sha)]},
        "another fate": {"records": [r._replace(fate="shape") if r == one else r for r in found.records]},
        "a record out of nowhere": {"records": [*found.records, Record(10_000, f"hub:org/none@{'0' * 40}", "gone")]},
        "a push that is left": {"inbox": ["0" * 32 + ".json"]},
        "a leak": {"leaks": 1},
        "a secret": {"secrets": ["commits/00000001.json"]},
        "a bad end": {"code": 4},
        "a finding of verify": {"verify": ["it is damaged"]},
        "a traceback": {"log": "Traceback (most recent call last)"},
    }
    if stranger:
        name = next(iter(stranger.names))
        altered["a record of an unrelated repo"] = {"records": [*found.records, Record(10_000, f"hub:{name}@{stranger.sha}", "superseded")]}
    before = set(problems(found))
    return {name: bool(set(problems(dataclasses.replace(found, **change))) - before) for name, change in altered.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repos", type=int, default=30)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rule", choices=RULES, help="default: one by the seed")
    parser.add_argument("--rate", type=float, default=0.12, help="share of the daemon's requests that fail; half of it for the publisher's")
    parser.add_argument("--dir", type=Path, help="where to work, kept; default: a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rule = args.rule or RULES[args.seed % len(RULES)]
        found = campaign(args.dir or Path(temporary) / "work", args.repos, args.kills, args.seed, rule=rule, rate=args.rate)
    json.dump({**found.summary, "problems": found.told}, sys.stdout, indent=2)
    print()
    sys.exit(1 if found.told else 0)


if __name__ == "__main__":
    main()
