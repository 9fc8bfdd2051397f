"""What a state should hold, kept as a plain list; and what a state says of itself, in the same words."""

from __future__ import annotations

from dataclasses import dataclass, field

from continual.records import Candidate, SlotSpec
from continual.state import State
from continual.state.parts import BroughtFold, FoldNumbers

KEYS = ("a", "b", "c", "d", "e")
SLOTS = {"written": SlotSpec((3,)), "rewritten": SlotSpec((2, 2), "float64"), "kept": SlotSpec(())}
WORTH = {key: float(3**number) for number, key in enumerate(KEYS)}
"""What a fold of each candidate adds to every value: sums of these tell which are in."""


@dataclass(frozen=True)
class Moment:
    """What is in force after a record: (key, record) of each fold in order, a number for the generation (0 is none),
    the totals' count and the tags."""

    folds: tuple[tuple[str, int], ...] = ()
    generation: int = 0
    count: float = 0.0

    @property
    def worth(self) -> float:
        return sum(WORTH[key] for key, _ in self.folds)


@dataclass
class Model:
    """What should be in the state: a moment a record, and every candidate's fate."""

    moments: list[Moment] = field(default_factory=lambda: [Moment()])
    fates: dict[str, tuple[str, int]] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refusals: list[int] = field(default_factory=list)
    models: list[int] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    newest: int = 0

    @property
    def now(self) -> Moment:
        return self.moments[-1]

    def add(self, moment: Moment) -> int:
        self.moments.append(moment)
        return len(self.moments) - 1

    def generation(self) -> int:
        self.newest += 1
        self.kept.add(self.newest)
        return self.newest

    def settle(self, key: str, fate: str, seq: int) -> None:
        self.fates[key] = (fate, seq)
        if key in self.pool:
            self.pool.remove(key)

    def reopen(self, key: str) -> None:
        self.fates.pop(key, None)
        if key in self.pool:
            self.pool.remove(key)

    def fold(self, *keys: str) -> None:
        seq, now = len(self.moments), self.now
        folds = now.folds + tuple((key, seq) for key in keys)
        self.models.append(self.add(Moment(folds, self.generation(), float(len(folds)))))
        for key in keys:
            self.settle(key, "folded", seq)

    def unfold(self, key: str, generation: int | None) -> None:
        folds = tuple(fold for fold in self.now.folds if fold[0] != key)
        made = self.generation() if generation is None else generation
        self.models.append(self.add(Moment(folds, made, float(len(folds)))))
        self.settle(key, "unfolded", len(self.moments) - 1)

    def rollback(self, to: int) -> None:
        now, target = self.now, self.moments[to]
        for key, seq in now.folds:
            if (key, seq) not in target.folds:
                self.fates[key] = ("rolled-back", seq)
        for key, seq in target.folds:
            self.settle(key, "folded", seq)
        self.models.append(self.add(target))

    def expired(self, keep: int, leased: set[int]) -> set[int]:
        """The generations that go."""
        newest = list(dict.fromkeys(m.generation for m in reversed(self.moments) if m.generation))[:keep]
        tagged = {self.moments[seq].generation for seq in self.tags.values()}
        return self.kept - {self.now.generation, *newest, *tagged, *leased}


def candidate(key: str) -> Candidate:
    return Candidate(key, f"name of {key}", "folder", f"/in/{key}", "full", 1)


def brought(key: str) -> BroughtFold:
    return BroughtFold(candidate(key), f"digest of {key}", FoldNumbers(tau_norm=WORTH[key]))


def told(state: State) -> dict[str, object]:
    """What the ledger of a state says of all that the list knows."""
    ledger = state.ledger
    everywhen = range(len(ledger.log))
    fates = {key: ledger.fate(key) for key in KEYS}
    digests = {key: ledger.folded_digest(f"digest of {key}") for key in KEYS}
    return {
        "folds": [[(c.entry.candidate.key, c.seq) for c in ledger.folds(at=seq)] for seq in everywhen],
        "totals": [ledger.totals_at(seq).count for seq in everywhen],
        "generations": [commit.generation for commit in ledger.log],
        "fates": {key: (fate.entry.fate, fate.seq) if fate else None for key, fate in fates.items()},
        "settled": {key for key in KEYS if ledger.is_settled(key)},
        "pool": list(ledger.pool),
        "retried": [candidate.key for candidate in ledger.retried()],
        "digests": {key: fold.seq if fold else None for key, fold in digests.items()},
        "refusals": [commit.seq for commit in ledger.refusals],
        "models": [commit.seq for commit in ledger.models],
        "tags": ledger.tags,
        "head": ledger.head.seq,
    }
