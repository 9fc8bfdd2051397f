"""The campaign on the Hub: a daemon that is killed again and again follows a Hub that fails, while all kinds of repos
are published there with the real client.

    python -m tests.campaigns.faults.hub --repos 30 --kills 5 --seed 0

The Hub is the one of tests/loopback: it answers with errors, drops and slow bodies, its lists are stale, its webhooks
are doubled, mixed and lost. Repos live their lives in random order (`KINDS`); the daemon dies at random instants of a
fold, a poll, a look, a commit, a push, or at any time. Faults end only when all is settled, for two last polls. Then
everything is judged against what was published, by `problems`: one settled fate for each (repo, commit) and the right
one; and the state is bit-equal to one into which the accepted commits were folded from folders, in the ledger's order.
Each run also shows that these checks can fail, on altered data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars

import continual
from continual import making
from continual.state.verify import verify
from tests.campaigns.faults.hub.evidence import Evidence, Record, bits, offline, problems, published, records, secrets
from tests.campaigns.faults.hub.lives import KINDS, MOMENTS, READER, RULES, Life, World, private
from tests.campaigns.faults.hub.service import Service, Watcher, policy, pushes, whose
from tests.helpers import hubs
from tests.helpers.hubs import BASE
from tests.loopback import Account, Deliveries, Hub, Request, environment, online, serving
from tests.loopback import faults as wrong


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
    small: bool = False,
) -> Result:
    """Runs a campaign in `work`; `told` of the result is empty where every promise was kept. Raises AssertionError if
    it takes `limit` seconds.

    `small` makes the state from a folder, and tells the daemon of everything only twice.
    """
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
        if not small:
            command = [sys.executable, "-m", "continual", "init", BASE, "--state", str(state), "--rule", rule]
            subprocess.run(command, check=True, env=environment(hub, work, token=READER), stdout=subprocess.DEVNULL)
        else:
            making.init(world.base, state, making.Recipe(rule=rule))
        deliveries = stack.enter_context(Deliveries(hub, seed=seed, duplicate=0.3, drop=0.2, shuffle=True, attempts=3))
        watcher = stack.enter_context(Watcher(world, state, deliveries))
        service = Service(world, watcher, state)
        stack.callback(service.close)
        hub.faults = policy(seed, rate, outages=not small)
        service.start()
        kinds = live(world, watcher, service, repos, kills, begun + limit)
        after = time.monotonic()
        hub.faults = policy(seed, rate, outages=False)
        deliveries.settle()
        quiet(world, kinds, service, begun + limit)
        watcher.look()  # the last record of a repo that is gone may be newer than its last look
        early = watcher.seen | pushes([(change, status) for _, change, status in deliveries.sent])
        lost = {key for key in early if key.rpartition("@")[2] not in world.fates}
        again = []
        for _ in range(1 if small else 2):  # everything once more, late and out of order, and then again
            again += [
                (change, status)
                for change in draw.sample(hub.changes, len(hub.changes))
                for status in hub.deliver(change)
            ]
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
        findings, ours = verify(merge.state), bits(merge)
    told_of = again + [(change, status) for _, change, status in deliveries.sent]
    evidence = Evidence(
        commits=commits,
        records=records(state),
        seen=frozenset(watcher.seen | pushes(told_of)),
        lost=frozenset(lost),
        code=code,
        verify=findings,
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
        told += ["negative control: a fold that was left out was not noticed"] if ours.equal(left_out) else []
        swapped = offline(work / "swapped", world, rule, [*folded[:-2], folded[-1], folded[-2]])
        told += (
            ["negative control: two folds that were swapped were not noticed"]
            if rule == "opcm" and ours.equal(swapped)
            else []
        )
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
    waits: dict[str, Callable[[], bool] | None] = {}

    for number, name in enumerate((list(KINDS) * (repos // len(KINDS) + 1))[:repos]):
        repo = f"{'ours' if name == 'private-ours' else draw.choice(('org', 'people', 'lab'))}/{name}-{number}"
        kinds[repo], lives[repo], waits[repo] = name, KINDS[name].live(world, repo), None
    moments = [MOMENTS[n % len(MOMENTS)] for n in range(draw.randrange(len(MOMENTS)), len(MOMENTS) * 100)][:kills]
    draw.shuffle(moments)
    total, due = 3 * repos, 0
    steps = 0
    while lives or moments or watcher.armed:
        assert time.monotonic() < end, f"stuck: {list(lives)}, {moments} to come\n{service.log()}"
        listens = service.alive()
        if listens and moments and not watcher.armed and (steps >= total * (due + 0.3) / kills or not lives):
            due += 1
            moment = moments.pop(0)
            watcher.arm(moment, draw.randrange(4), 5.0 if moment == "push" else draw.uniform(1.0, 4.0))
            if moment == "push":  # of a repo that the daemon hears of in no other way
                kinds[repo := f"lab/private-theirs-pushed-{due}"] = "private-theirs"
                list(private(world, repo))
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
    """Waits until nothing is left to do: every head that is to have a fate has one, no push waits, and the queue is
    empty."""

    def open_heads() -> list[str]:
        heads = {name: repo.branches["main"] for name, repo in world.hub.state().items() if name in world.lives}
        return [
            n for n, sha in heads.items() if None not in KINDS[kinds[world.lives[n]]].last and sha not in world.fates
        ]

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
    if isinstance(fault, wrong.Status):
        return str(fault.status)
    return type(fault).__name__.lower() + (
        " in the body" if isinstance(fault, wrong.Drop | wrong.Stall) and fault.after else ""
    )


def controls(found: Evidence) -> dict[str, bool]:
    """Whether `problems` notices what it has to, on altered evidence."""
    one = next(r for r in found.records if r.fate == "folded")
    head = next(c for c in found.commits if c.head and KINDS[c.kind].taken)
    stranger = next((c for c in found.commits if c.kind == "unrelated" and not c.empty), None)
    altered: dict[str, dict[str, Any]] = {
        "a second record of a key": {"records": [*found.records, one._replace(seq=10_000)]},
        "a lost record": {"records": [r for r in found.records if not r.key.endswith(head.sha)]},
        "another fate": {"records": [r._replace(fate="shape") if r == one else r for r in found.records]},
        "a record out of nowhere": {"records": [*found.records, Record(10_000, f"hub:org/none@{'0' * 40}", "gone")]},
        "a push that was lost": {"lost": frozenset([f"hub:{next(iter(head.names))}@{head.sha}"])},
        "a push that is left": {"inbox": ["0" * 32 + ".json"]},
        "a leak": {"leaks": 1},
        "a secret": {"secrets": ["commits/00000001.json"]},
        "a bad end": {"code": 4},
        "a finding of verify": {"verify": ["it is damaged"]},
        "a traceback": {"log": "Traceback (most recent call last)"},
    }
    if stranger:
        name = next(iter(stranger.names))
        altered["a record of an unrelated repo"] = {
            "records": [*found.records, Record(10_000, f"hub:{name}@{stranger.sha}", "superseded")]
        }
    before = set(problems(found))
    return {
        name: bool(set(problems(dataclasses.replace(found, **change))) - before) for name, change in altered.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repos", type=int, default=30)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rule", choices=RULES, help="default: one by the seed")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.12,
        help="share of the daemon's requests that fail; half of it for the publisher's",
    )
    parser.add_argument("--dir", type=Path, help="where to work, kept; default: a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rule = args.rule or RULES[args.seed % len(RULES)]
        found = campaign(
            args.dir or Path(temporary) / "work", args.repos, args.kills, args.seed, rule=rule, rate=args.rate
        )
    json.dump({**found.summary, "problems": found.told}, sys.stdout, indent=2)
    print()
    sys.exit(1 if found.told else 0)
