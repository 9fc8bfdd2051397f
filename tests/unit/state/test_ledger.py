"""The pool in the ledger: who waits after each kind of record, what a round settles, and that a replay from the bytes
ends up where the writer was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from continual.state import framing
from continual.state.entries import (
    CombineEntry,
    DeferEntry,
    Entry,
    FoldEntry,
    InitEntry,
    RefuseEntry,
    RetryEntry,
    RollbackEntry,
    UnfoldEntry,
)
from continual.state.format import Commit
from continual.state.ledger import Fold, Ledger, Waiting, chain
from continual.state.parts import FoldNumbers, RowFate
from tests.helpers.entries import ROUND, brought, candidate, row, select


class Book:
    """Records one after the other, into a ledger and as the files of a state have them."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.files: list[bytes] = []
        self.generation: str | None = None
        self.add(InitEntry(read={"policy": "number", "value": 1.0}))

    def add(self, entry: Entry, *, writes: bool = False) -> int:
        seq = len(self.files)
        if writes:
            self.generation = f"g{seq}"
        commit = Commit(seq, None, "", self.generation, None, f"2030-01-01T00:00:{seq:02d}.000Z", entry)
        self.files.append(framing.encode(commit.body())[0])
        self.ledger.add(commit)
        return seq

    def defer(self, *names: str) -> None:
        for name in names:
            self.add(DeferEntry(candidate=candidate(name)))

    def fold(self, name: str) -> int:
        entry = FoldEntry(candidate=candidate(name), digest=f"d-{name}", numbers=FoldNumbers(tau_norm=1.0))
        return self.add(entry, writes=True)

    def select(self, *rows: tuple[str, RowFate, int], **merge: Any) -> int:
        return self.add(select(*(row(*r) for r in rows), **merge), writes="active" in merge)

    @property
    def pool(self) -> dict[str, Waiting]:
        return self.ledger.pool

    @property
    def folded(self) -> list[str]:
        return [f.commit.entry.candidate.name for f in chain(self.ledger.last_fold(len(self.files) - 1))]

    def waits(self) -> list[str]:
        return [key.removeprefix("k-") for key in self.pool]

    def fate(self, name: str) -> tuple[str | None, str | None] | None:
        found = self.ledger.fate(f"k-{name}")
        return None if found is None else (found.entry.fate, found.entry.reason)

    def replayed(self, place: Path) -> Ledger:
        again = Ledger()
        for number, data in enumerate(self.files):
            file = place / f"{number}.json"
            file.write_bytes(data)
            again.add(Commit.of(framing.decode(file)[0], "", file))
        return again


@pytest.fixture
def book() -> Book:
    found = Book()
    found.defer("a", "b", "c")
    return found


def test_who_waits_in_the_order_of_coming(book: Book) -> None:
    assert book.waits() == ["a", "b", "c"]
    assert (book.pool["k-b"].since, book.pool["k-b"].rounds, book.pool["k-b"].last) == (
        "2030-01-01T00:00:02.000Z",
        0,
        None,
    )
    assert book.fate("a") is None, "nothing is settled"


@pytest.mark.parametrize("kind", ["refuse", "retry", "unfold"])
def test_a_record_of_its_own_takes_a_candidate_out(book: Book, kind: Any) -> None:
    if kind == "unfold":
        of = book.fold("b")
        book.add(UnfoldEntry(candidate=candidate("b"), of=of, key="k-b"))
    else:
        book.add(RefuseEntry(candidate=candidate("b")) if kind == "refuse" else RetryEntry(candidate=candidate("b")))
    assert book.waits() == ["a", "c"]
    book.defer("b")
    assert book.waits() == ["a", "c", "b"]


def test_what_was_said_last_of_a_candidate_is_known_without_a_search(book: Book) -> None:
    assert book.ledger.asked("k-b") is None, "it only waits"
    for entry in (
        RefuseEntry(candidate=candidate("b")),
        RetryEntry(candidate=candidate("b"), because="meant so"),
        RetryEntry(candidate=candidate("a")),
    ):
        seq = book.add(entry)
        assert book.ledger.asked(entry.candidate.key) is book.ledger.log[seq]
    asked = book.ledger.asked("k-b")
    book.fold("b")
    book.add(RollbackEntry(to=0, undone=1))
    assert book.ledger.asked("k-b") is asked


def test_a_fold_takes_it_out(book: Book) -> None:
    book.fold("a")
    assert (book.waits(), book.folded, book.fate("a")) == (["b", "c"], ["a"], ("folded", None))


def test_a_combined_state_takes_out_what_it_brings(book: Book) -> None:
    book.add(CombineEntry(of="other", seq=3, folds=(brought("b"), brought("x"))), writes=True)
    assert (book.waits(), book.folded) == (["a", "c"], ["b", "x"])


def test_what_a_rollback_undoes_is_counted_by_fold_and_not_by_record(book: Book) -> None:
    before = book.fold("a")
    joined = book.add(CombineEntry(of="other", seq=3, folds=(brought("x"), brought("y"))), writes=True)
    book.fold("b")

    def undone(to: int) -> list[str]:
        return [c.entry.candidate.name for c in book.ledger.undone(to)]

    assert (undone(joined), undone(before), undone(0)) == (["b"], ["x", "y", "b"], ["a", "x", "y", "b"])
    book.add(UnfoldEntry(candidate=candidate("x"), of=joined, key="k-x"), writes=True)
    assert undone(joined) == ["b"], "a fold of the same record that went in between does not count"
    book.add(RollbackEntry(to=joined, undone=1))
    assert undone(joined) == []


def test_a_round_is_open_until_it_has_chosen(book: Book) -> None:
    assert book.ledger.open_round is None
    first = book.add(ROUND)
    book.fold("a")
    assert book.ledger.open_round is not None
    assert book.ledger.open_round.seq == first
    second = book.add(ROUND)
    assert book.ledger.open_round.seq == second, "the newer one counts"
    book.select(("b", "deferred", 1))
    assert book.ledger.open_round is None


def test_what_a_table_settles(book: Book) -> None:
    book.defer("d")
    book.select(
        ("a", "deferred", 1), ("b", "refused", 1), ("c", "expired", 0), ("d", "deferred", 0), ("stranger", "refused", 1)
    )
    assert book.waits() == ["a", "d"]
    assert [w.rounds for w in book.pool.values()] == [1, 0]
    assert book.pool["k-a"].last.message == "a: said"
    assert (book.fate("b"), book.fate("c"), book.fate("stranger")) == (("refused", "r"), ("expired", "r"), None)
    settled = book.ledger.fate("k-b")
    assert settled is not None
    assert (settled.seq, settled.entry.message, settled.entry.candidate.origin) == (5, "b: said", "/in/b")
    book.select(("a", "deferred", 1), ("d", "deferred", 1))
    assert [(w.rounds, w.since) for w in book.pool.values()] == [
        (2, "2030-01-01T00:00:01.000Z"),
        (1, "2030-01-01T00:00:04.000Z"),
    ]


def test_chosen_ones_wait_until_they_are_folded(book: Book) -> None:
    book.select(("a", "deferred", 1), ("b", "chosen", 0))
    assert book.waits() == ["a", "b", "c"]
    assert book.pool["k-b"].last.fate == "chosen"
    book.fold("b")
    assert book.waits() == ["a", "c"]


def test_a_select_that_writes_nothing_leaves_the_model(book: Book) -> None:
    book.fold("a")
    model = book.ledger.model
    book.select(("b", "deferred", 1))
    assert book.ledger.model is model
    assert book.folded == ["a"]


def test_weighed_models_come_and_go(book: Book) -> None:
    first = book.select(
        ("a", "folded", 0),
        ("b", "folded", 0),
        ("c", "deferred", 1),
        active={"k-a": (0.5,), "k-b": (0.25,)},
        folds=(
            brought("a"),
            brought("b"),
        ),
    )
    assert (book.folded, book.waits()) == (["a", "b"], ["c"])
    assert book.ledger.model is not None
    assert book.ledger.model.seq == first
    assert book.ledger.folded_digest("d-b") is not None
    second = book.select(
        ("a", "folded", 0),
        ("b", "deferred", 1),
        ("c", "folded", 0),
        active={"k-a": (0.5,), "k-c": (1.0,)},
        folds=(brought("c"),),
        out=("k-b",),
    )
    assert (book.folded, book.waits()) == (["a", "c"], ["b"])
    assert (book.fate("a"), book.fate("b")) == (("folded", None), None)
    assert book.ledger.folded_digest("d-b") is None, "what left may come back"
    assert (book.pool["k-b"].rounds, book.pool["k-b"].since) == (1, f"2030-01-01T00:00:{first:02d}.000Z")
    newest = book.ledger.last_fold(second)
    assert newest is not None
    assert newest.at is not None
    assert newest.at.seq == second, "all of them are read from the newest generation"
    book.select(
        active={},
        out=(
            "k-a",
            "k-c",
        ),
    )
    assert (book.folded, sorted(book.waits())) == ([], ["a", "b", "c"])


def test_one_that_left_and_is_given_up_at_once(book: Book) -> None:
    book.select(active={"k-a": (1.0,)}, folds=(brought("a"),))
    book.select(("a", "refused", 1), active={}, out=("k-a",))
    assert (book.waits(), book.fate("a")) == (["b", "c"], ("refused", "r"))


def test_going_back_takes_what_is_in_the_merge_again_out_of_the_pool(book: Book) -> None:
    first = book.select(("a", "folded", 0), active={"k-a": (1.0,)}, folds=(brought("a"),))
    book.select(("a", "deferred", 1), ("b", "folded", 0), active={"k-b": (1.0,)}, folds=(brought("b"),), out=("k-a",))
    assert (book.folded, book.waits()) == (["b"], ["c", "a"])
    book.add(RollbackEntry(to=first, undone=1))
    assert (book.folded, book.waits()) == (["a"], ["c"])
    assert (book.fate("a"), book.fate("b")) == (("folded", None), ("rolled-back", None))
    assert (book.ledger.folded_digest("d-a") is None, book.ledger.folded_digest("d-b") is None) == (False, True)


def test_a_replay_ends_up_where_the_writer_was(tmp_path: Path, book: Book) -> None:
    book.defer("d", "e")
    book.add(ROUND)
    book.select(
        ("a", "folded", 0),
        ("b", "deferred", 1),
        ("c", "refused", 1),
        active={
            "k-a": (
                0.1,
                0.2,
            )
        },
        folds=(brought("a"),),
        rest=(),
    )
    book.select(("a", "deferred", 1), ("d", "folded", 0), active={"k-d": (1.0,)}, folds=(brought("d"),), out=("k-a",))
    book.add(RollbackEntry(to=7, undone=1))
    book.add(RetryEntry(candidate=candidate("d")))
    book.select(("b", "deferred", 1), ("e", "expired", 1))
    book.add(ROUND)

    def told(ledger: Ledger) -> Any:
        def fold(found: Fold) -> Any:
            return found.commit.seq, found.commit.entry.candidate, found.at and found.at.seq

        histories = [[fold(f) for f in chain(ledger.last_fold(seq))] for seq in range(len(ledger.log))]
        pool = {key: (w.commit.seq, w.since, w.rounds, w.last) for key, w in ledger.pool.items()}
        fates = {key: (f.seq, f.entry) if (f := ledger.fate(f"k-{key}")) else None for key in "abcde"}
        digests = {key: f.seq if (f := ledger.folded_digest(f"d-{key}")) else None for key in "abcde"}
        rest = (ledger.model and ledger.model.seq, ledger.open_round and ledger.open_round.seq)
        return histories, list(pool.items()), fates, digests, rest

    assert told(book.replayed(tmp_path)) == told(book.ledger)
    assert book.waits() == ["b"]
    assert book.pool["k-b"].rounds == 2
