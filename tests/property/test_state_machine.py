"""The state against a plain list: whatever is begun, committed, given up, refused, undone, tagged, deleted or killed,
in any order, the state in memory, the state read anew from its files, and a list of what should be there say the same.

`CONTINUAL_STATE_EXAMPLES=1000 python -m pytest tests/property/test_state_machine.py` looks further.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from continual.errors import Misconfigured, Retry
from continual.records import TensorSpec, Totals
from continual.state import Format, State, Transaction, excerpts
from continual.state.entries import CombineEntry, DeferEntry, Entry, FoldEntry, RefuseEntry, RetryEntry, UnfoldEntry
from continual.state.parts import FoldNumbers
from continual.state.verify import verify
from tests.helpers import stores
from tests.helpers.state_as_list import KEYS, SLOTS, WORTH, Model, brought, candidate, told

EXAMPLES = int(os.environ.get("CONTINUAL_STATE_EXAMPLES", "20"))
OF_RECORD = ("temp-commit", "link", "fsync-commits", "head", "acknowledged")
OF_FOLD = ("begin", "chunks", "fsync-files", "fsync-dirs", *OF_RECORD)
AFTER_THE_COMMIT_POINT = ("fsync-commits", "head", "acknowledged")


def kills(steps: tuple[str, ...]) -> st.SearchStrategy[str | None]:
    """At which step the process ends, if it does: one time in three."""
    return st.sampled_from((*(None,) * (2 * len(steps)), *steps))


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Open:
    """A transaction that was begun: for whom, and which generation was in force then."""

    key: str
    transaction: Transaction
    began: int


class StateAgainstAList(RuleBasedStateMachine):
    """One writer with its state, and any number of leases."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.home = Path(tempfile.mkdtemp(prefix="continual-state-", dir=memory if memory.is_dir() else None))
        self.path = self.home / "state"
        self.model = Model()
        self.ids: dict[int, str] = {}
        self.begun: list[Open] = []
        self.leases: list[tuple[int, contextlib.ExitStack]] = []
        self.kill_at: str | None = None
        self.state: State | None = None

    @initialize()
    def make(self) -> None:
        slots = {name: {"sum": spec} for name, spec in SLOTS.items()} | {"carried": {}}
        specs = [TensorSpec(name, spec.shape, "F32", "plain") for name, spec in SLOTS.items()]
        form = Format.new(stores.BASE, [*specs, TensorSpec("carried", (2,), "I64", "carried")], "mean", {}, slots)
        State.create(self.path, form, read={"value": 1.0}, device="cpu").close()
        self.open()

    def open(self) -> None:
        self.state = State.open(self.path, write=True, on_step=self.step)
        self.begun.clear()  # what an earlier process began is an orphan, and has gone

    def step(self, name: str) -> None:
        if name == self.kill_at:
            raise Killed(name)

    def teardown(self) -> None:
        for _, stack in self.leases:
            stack.close()
        if self.state is not None:
            self.state.close()
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def store(self) -> State:
        assert self.state is not None
        return self.state

    def doing(self, act: Callable[[], object], kill: str | None, then: Callable[[], None]) -> None:
        """Does something that makes a record, and `then` what it means for the list; with a kill at a step, the process
        ends there and another one opens the state. A record counts from its commit point on."""
        self.kill_at = kill
        try:
            act()
        except Killed:
            self.kill_at = None
            if kill in AFTER_THE_COMMIT_POINT:
                then()
                self.names()
            self.store.close()
            self.open()
        else:
            self.kill_at = None
            then()
            self.names()

    def names(self) -> None:
        """Which directory a new generation of the list is."""
        now = self.model.now.generation
        if now and now not in self.ids:
            name = self.store.ledger.head.generation
            assert name is not None
            self.ids[now] = name

    def open_keys(self) -> list[str]:
        """Candidates that may be folded: those in the merge may not."""
        inside = {key for key, _ in self.model.now.folds}
        return [key for key in KEYS if key not in inside and self.model.fates.get(key, ("", 0))[0] != "refused"]

    def write(self, transaction: Transaction, change: float) -> None:
        """Changes every value by `change`, each tensor in another of the ways there are."""
        transaction.write("written", "sum", transaction.read("written", "sum") + np.float32(change))
        for _, _, values in transaction.runs("rewritten", 3):
            values["sum"] += change
        transaction.keep("kept")

    # what a writer does

    @rule(data=st.data(), kill=kills(OF_FOLD))
    def fold(self, data: st.DataObject, kill: str | None) -> None:
        if not (keys := self.open_keys()):
            return
        key = data.draw(st.sampled_from(keys))

        def act() -> None:
            transaction = self.store.begin()
            self.write(transaction, WORTH[key])
            self.store.commit(transaction, self.entry(key))

        self.doing(act, kill, lambda: self.model.fold(key))

    @precondition(lambda self: len(self.begun) < 3)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        if not (keys := self.open_keys()):
            return
        key = data.draw(st.sampled_from(keys))
        transaction = self.store.begin()
        self.write(transaction, WORTH[key])
        self.begun.append(Open(key, transaction, self.model.now.generation))

    @precondition(lambda self: self.begun)
    @rule(data=st.data(), kill=kills(OF_FOLD))
    def commit(self, data: st.DataObject, kill: str | None) -> None:
        begun = self.begun.pop(data.draw(st.integers(0, len(self.begun) - 1)))
        if begun.key in {key for key, _ in self.model.now.folds}:
            begun.transaction.abandon()
        elif begun.began != self.model.now.generation:
            with begun.transaction, pytest.raises(Retry, match="another fold was committed meanwhile"):
                self.store.commit(begun.transaction, self.entry(begun.key))
        else:
            act, then = self.store.commit, self.model.fold
            self.doing(lambda: act(begun.transaction, self.entry(begun.key)), kill, lambda: then(begun.key))

    @precondition(lambda self: self.begun)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        self.begun.pop(data.draw(st.integers(0, len(self.begun) - 1))).transaction.abandon()

    @rule(key=st.sampled_from(KEYS), kill=kills(OF_RECORD))
    def refuse(self, key: str, kill: str | None) -> None:
        if key in {k for k, _ in self.model.now.folds}:
            return

        def then() -> None:
            seq = self.model.add(self.model.now)
            self.model.settle(key, "refused", seq)
            self.model.refusals.append(seq)

        self.record(RefuseEntry(candidate=candidate(key), reason="shape", message="no"), kill, then)

    @rule(key=st.sampled_from(KEYS), kill=kills(OF_RECORD))
    def defer(self, key: str, kill: str | None) -> None:
        if self.store.ledger.is_settled(key):
            return

        def then() -> None:
            self.model.add(self.model.now)
            self.model.reopen(key)
            self.model.pool.append(key)

        self.record(DeferEntry(candidate=candidate(key)), kill, then)

    @rule(key=st.sampled_from(KEYS), kill=kills(OF_RECORD))
    def retry(self, key: str, kill: str | None) -> None:
        if key in {k for k, _ in self.model.now.folds}:
            return

        def then() -> None:
            self.model.add(self.model.now)
            self.model.reopen(key)
            if key not in self.model.asked:
                self.model.asked.append(key)

        self.record(RetryEntry(candidate=candidate(key)), kill, then)

    @rule(data=st.data(), kill=kills(OF_RECORD))
    def rollback(self, data: st.DataObject, kill: str | None) -> None:
        to = data.draw(st.integers(0, len(self.model.moments) - 1))
        target = self.model.moments[to]
        if target.generation not in {0, *self.model.kept}:
            with pytest.raises(Misconfigured, match="expired"):
                self.store.rollback(to)
            return
        undone = [fold for fold in self.model.now.folds if fold not in target.folds]
        assert [(c.entry.candidate.key, c.seq) for c in self.store.ledger.undone(to)] == undone
        self.doing(lambda: self.store.rollback(to), kill, lambda: self.model.rollback(to))

    @rule(data=st.data(), name=st.sampled_from(("v1", "v2")), kill=kills(OF_RECORD))
    def tag(self, data: st.DataObject, name: str, kill: str | None) -> None:
        of = data.draw(st.integers(0, len(self.model.moments) - 1))
        if self.model.moments[of].generation not in {0, *self.model.kept}:
            with pytest.raises(Misconfigured, match="expired"):
                self.store.tag(name, of)
            return

        def then() -> None:
            self.model.add(self.model.now)
            self.model.tags[name] = of

        self.doing(lambda: self.store.tag(name, of, force=True), kill, then)

    @precondition(lambda self: self.model.now.folds)
    @rule(data=st.data(), anew=st.booleans(), kill=kills(OF_FOLD))
    def unfold(self, data: st.DataObject, anew: bool, kill: str | None) -> None:
        """Takes a fold out: by subtracting it, or by writing the others anew on an older generation. The only one and
        the last one may also be taken out by a record that writes nothing."""
        index = data.draw(st.integers(0, len(self.model.now.folds) - 1))
        key, seq = self.model.now.folds[index]
        left = [fold for fold in self.model.now.folds if fold[0] != key]
        entry = UnfoldEntry(
            candidate=candidate(key), digest=f"digest of {key}", of=seq, key=key, totals=Totals(count=float(len(left)))
        )
        older = [s for s, m in enumerate(self.model.moments) if m.generation in {0, *self.model.kept}]
        start = data.draw(st.sampled_from(older))
        moment = self.model.moments[start]
        if anew and moment.folds == tuple(left):
            generation = self.store.generation_of(self.store.ledger.get(start))
            self.record(entry, kill, lambda: self.model.unfold(key, moment.generation), generation)
            return

        def act() -> None:
            if anew:
                transaction = self.store.begin(self.store.generation_of(self.store.ledger.get(start)))
                self.write(transaction, sum(WORTH[k] for k, _ in left) - moment.worth)
            else:
                transaction = self.store.begin()
                self.write(transaction, -WORTH[key])
            self.store.commit(transaction, entry)

        self.doing(act, kill, lambda: self.model.unfold(key, None))

    @rule(data=st.data(), kill=kills(OF_FOLD))
    def combine(self, data: st.DataObject, kill: str | None) -> None:
        inside = {key for key, _ in self.model.now.folds}
        outside = [key for key in KEYS if key not in inside]
        if not outside:
            return
        keys = data.draw(st.lists(st.sampled_from(outside), min_size=1, max_size=2, unique=True))
        count = float(len(self.model.now.folds) + len(keys))
        entry = CombineEntry(of="f" * 32, seq=7, folds=tuple(brought(k) for k in keys), totals=Totals(count=count))

        def act() -> None:
            transaction = self.store.begin()
            self.write(transaction, sum(WORTH[key] for key in keys))
            self.store.commit(transaction, entry)

        self.doing(act, kill, lambda: self.model.fold(*keys))

    @rule(keep=st.sampled_from((1, 1, 2, 3)))
    def expire(self, keep: int) -> None:
        going = self.model.expired(keep, {generation for generation, _ in self.leases})
        assert sorted(self.store.expire(keep)) == sorted(self.ids[generation] for generation in going)
        self.model.kept -= going

    @precondition(lambda self: len(self.leases) < 2)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        seq = data.draw(st.integers(0, len(self.model.moments) - 1))
        generation, stack = self.model.moments[seq].generation, contextlib.ExitStack()
        reader = stack.enter_context(State.open(self.path))
        if generation in {0, *self.model.kept}:
            stack.enter_context(reader.lease(seq))
            self.leases.append((generation, stack))
            return
        with stack, pytest.raises(Misconfigured, match="expired"):
            stack.enter_context(reader.lease(seq))

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.leases.pop(0)[1].close()

    @rule()
    def reopen(self) -> None:
        """The process ends, with whatever it had begun, and another one opens the state."""
        self.store.close()
        self.open()

    def entry(self, key: str) -> FoldEntry:
        count = float(len(self.model.now.folds) + 1)
        numbers = FoldNumbers(tau_norm=WORTH[key])
        return FoldEntry(
            candidate=candidate(key), digest=f"digest of {key}", numbers=numbers, totals=Totals(count=count)
        )

    def record(self, entry: Entry, kill: str | None, then: Callable[[], None], generation: Any = "now") -> None:
        self.doing(lambda: self.store.record(entry, generation), kill, then)

    # what has to hold after each of them

    @invariant()
    def the_list_the_writer_and_the_files_agree(self) -> None:
        if self.state is None:
            return
        expected = self.expected()
        assert told(self.store) == expected
        with State.open(self.path) as read:
            assert told(read) == expected
            folds = read.ledger.folds()
            for origin in {c.origin or "" for c in read.ledger.log}:
                assert read.ledger.revisions(origin) == [fold for fold in folds if fold.origin == origin]
            held = [c.generation for c in reversed(read.ledger.log) if c.generation]
            assert list(reversed(read.ledger.generations)) == list(dict.fromkeys(held))
            assert set(read.orphans) == {begun.transaction.id for begun in self.begun}
            assert set(read.generations()) == {self.ids[generation] for generation in self.model.kept}
            for seq, moment in enumerate(self.model.moments):
                if moment.generation in {0, *self.model.kept}:
                    for name, spec in SLOTS.items():
                        worth = 0.0 if name == "kept" else moment.worth
                        np.testing.assert_array_equal(read.read(name, "sum", at=seq), np.full(spec.shape, worth))
            assert verify(read) == []

    def expected(self) -> dict[str, object]:
        """What `told` should say."""
        model = self.model
        fates = {key: model.fates.get(key) for key in KEYS}
        settled = {key for key in KEYS if fates[key] is not None or key in model.pool}
        return {
            "folds": [list(moment.folds) for moment in model.moments],
            "totals": [moment.count for moment in model.moments],
            "generations": [self.ids.get(moment.generation) for moment in model.moments],
            "fates": fates,
            "settled": settled,
            "pool": model.pool,
            "retried": [key for key in model.asked if key not in settled],
            "digests": {key: dict(model.now.folds).get(key) for key in KEYS},
            "refusals": model.refusals,
            "models": model.models,
            "tags": model.tags,
            "head": len(model.moments) - 1,
        }


@pytest.mark.slow
@pytest.mark.timeout(300 + 20 * EXAMPLES)
def test_the_state_is_a_list_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpts, "SPAN", 3)  # so that most records are known by excerpts
    run_state_machine_as_test(
        StateAgainstAList,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=35,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
