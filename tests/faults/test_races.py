"""Two at once on one state: folds that begin together, readers beside a writer, an expiry while something is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from continual import api, making
from continual.errors import Misconfigured, Retry
from continual.records import Candidate
from continual.state import State, Transaction
from continual.state.entries import RefuseEntry
from continual.state.verify import verify
from tests.helpers import models, stores
from tests.helpers.trace import at_event

pytestmark = pytest.mark.slow


def written(state: State, number: int) -> Transaction:
    """A fold that is written and not committed."""
    transaction = state.begin()
    for name in stores.SHAPES:
        transaction.write(name, "sum", stores.value(name, number))
    return transaction


def refuse(state: State) -> None:
    state.record(RefuseEntry(candidate=Candidate("bad", "bad", "test", "/bad", "full", 1), reason="shape"))


@pytest.mark.parametrize("second_first", [False, True], ids=["in order", "the later one first"])
@pytest.mark.parametrize("folds", [0, 1], ids=["the first folds", "later folds"])
def test_of_two_folds_that_began_together_one_is_committed(tmp_path: Path, folds: int, second_first: bool) -> None:
    with stores.make(tmp_path / "s") as state:
        for number in range(1, 1 + folds):
            stores.fold(state, number)
        begun = {2: written(state, 2), 3: written(state, 3)}
        first, second = (3, 2) if second_first else (2, 3)
        with begun[first] as transaction:
            won = state.commit(transaction, stores.entry(first))
        with begun[second] as transaction, pytest.raises(Retry, match="another fold was committed meanwhile"):
            state.commit(transaction, stores.entry(second))
        assert state.ledger.head == won
        assert (state.ledger.is_settled(f"k{first}"), state.ledger.is_settled(f"k{second}")) == (True, False)
        assert len(state.generations()) == len(list((tmp_path / "s/generations").iterdir())) == 1 + folds
        np.testing.assert_array_equal(state.read("wide", "sum"), stores.value("wide", first))
        with written(state, second) as transaction:
            state.commit(transaction, stores.entry(second))
    with State.open(tmp_path / "s") as state:
        assert [c.entry.candidate.key for c in state.ledger.folds()[folds:]] == [f"k{first}", f"k{second}"]
        assert verify(state) == []


def test_a_rollback_in_between_is_another_fold_and_a_refusal_is_not(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
        stores.fold(state, 2)
        with written(state, 3) as transaction:
            refuse(state)
            assert state.commit(transaction, stores.entry(3)).seq == 4
        with written(state, 4) as transaction:
            state.rollback(1)
            with pytest.raises(Retry, match="another fold"):
                state.commit(transaction, stores.entry(4))
        assert [c.seq for c in state.ledger.folds()] == [1]
        np.testing.assert_array_equal(state.read("wide", "sum"), stores.value("wide", 1))


def test_a_state_that_is_added_to_another_does_not_expire_while_it_is_read(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    for name in ("one", "other"):
        making.init(base, tmp_path / name, making.Recipe(rule="mean"))
    with api.open(tmp_path / "other", write=True) as other:
        assert other.fold(models.fine_tune(base, tmp_path / "ft-1", 1)).fate == "folded"
        expected = {name: other.read(name) for name in models.SHAPES}
    later, gone = models.fine_tune(base, tmp_path / "ft-2", 2), list[str]()

    def meanwhile(stage: str, done: int, _total: int) -> None:
        """The owner of the other state goes on: it folds, and deletes all that it may."""
        if (stage, done) == ("combine", 1):
            with api.open(tmp_path / "other", write=True) as other:
                assert other.fold(later).fate == "folded"
                gone.extend(other.state.expire(1))
                gone.append("looked")

    with api.open(tmp_path / "one", write=True, workers=1) as merge:
        assert merge.fold(models.fine_tune(base, tmp_path / "ft-3", 3)).fate == "folded"
        alone = {name: merge.read(name) for name in models.SHAPES}
        merge.combine(tmp_path / "other", progress=meanwhile)
        assert gone == ["looked"]
        for name in models.SHAPES:
            total = (alone[name].double() + expected[name].double()) / 2
            np.testing.assert_allclose(merge.read(name).double().numpy(), total.numpy(), rtol=1e-5, atol=1e-7)
    with State.open(tmp_path / "other", write=True) as state:
        assert len(state.expire(1)) == 1, "the lease ends with the reading"


@pytest.mark.parametrize("records", [1, 2, 5])
@pytest.mark.parametrize("where", ["between HEAD and the records", "between the records and the generation"])
def test_a_reader_that_opens_beside_a_writer_sees_one_whole_moment(tmp_path: Path, where: str, records: int) -> None:
    state = tmp_path / "s"
    with stores.make(state) as writer:
        stores.fold(writer, 1)

        def go_on() -> None:
            for number in range(2, 2 + records):
                stores.fold(writer, number)
            writer.expire(1)

        before = where == "between HEAD and the records"
        event = ("os.listdir", state / "commits") if before else ("open", state / "commits/00000001.json")
        with at_event(*event, go_on) as done, State.open(state) as reader:
            assert done
            assert reader.ledger.head.seq == 1 + records, "what it read first has expired"
            assert verify(reader) == []
            np.testing.assert_array_equal(reader.read("wide", "sum"), stores.value("wide", 1 + records))
            assert [c.seq for c in reader.ledger.log] == list(range(2 + records))


def test_a_reader_keeps_what_it_has_leased_and_no_more(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as writer:
        for number in (1, 2):
            stores.fold(writer, number)
        with State.open(tmp_path / "s") as reader, reader.lease(1):
            stores.fold(writer, 3)
            assert writer.expire(1) == [writer.ledger.get(2).generation]
            with pytest.raises(Misconfigured, match="expired"), reader.lease():
                raise AssertionError("the block runs although its generation has expired")
            np.testing.assert_array_equal(reader.read("wide", "sum", at=1), stores.value("wide", 1))
        assert writer.expire(1) == [writer.ledger.get(1).generation]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_what_is_kept(tmp_path: Path, keep: int) -> None:
    with stores.make(tmp_path / "s") as state:
        for number in range(1, 7):
            stores.fold(state, number)
        state.tag("old", 1)
        state.rollback(3)
        generations = [state.ledger.get(seq).generation for seq in range(7)]
        kept = {1, 3, *{1: (), 2: (6,), 4: (6, 5, 4)}[keep]}
        assert sorted(map(str, state.expire(keep))) == sorted(str(generations[n]) for n in set(range(1, 7)) - kept)
        assert set(state.generations()) == {generations[n] for n in kept}, "in force, tagged, and the newest"
        state.tag("old", 3, force=True)
        assert state.expire(1) == sorted(str(generations[n]) for n in kept - {3}), (
            "a tag that moved holds nothing there"
        )
        assert verify(state) == []


def test_a_tag_that_was_killed_before_its_file_is_completed(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)

    def die(step: str) -> None:
        if step == "acknowledged":
            raise KeyboardInterrupt

    with State.open(tmp_path / "s", write=True, on_step=die) as state, pytest.raises(KeyboardInterrupt):
        state.tag("v1")
    with State.open(tmp_path / "s") as reader:
        assert (reader.ledger.tags, verify(reader)) == ({"v1": 1}, []), "it is in flight"
    with State.open(tmp_path / "s", write=True) as state:
        stores.fold(state, 2)
        assert verify(state) == []
    (tmp_path / "s/tags/v1.json").unlink()
    with State.open(tmp_path / "s", write=True) as state:
        assert any("v1.json" in finding for finding in verify(state)), "a file that was there is damage"
