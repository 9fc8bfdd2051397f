"""Made-up records of the ledger, for tests that need some and do not care which."""

from __future__ import annotations

from typing import Any

from continual.records import Candidate, FileDigest, ObjectiveRecord
from continual.state.entries import RoundEntry, SelectEntry
from continual.state.parts import BroughtFold, FoldNumbers, MemberFate, RoundTerms, RowFate

TERMS = RoundTerms(
    trial=0.3,
    sigmas=3.0,
    stays=0.0,
    patience=3,
    step="corrective",
    rho=1.0,
    search="newton",
    layers=False,
    tolerance=1e-3,
    steps=30,
    best=1,
    active=8,
    inner=4,
    age=100.0,
    most=10,
)
OBJECTIVE = ObjectiveRecord(
    kind="function",
    objective="tests.helpers.quadratic:make",
    seed=0,
    held=0.5,
    batch=8,
    dtype="float32",
    unsupervised=False,
    code=FileDigest("quadratic.py", "blake3:0"),
    digest="blake3:1",
)
ROUND = RoundEntry(mode="relevance", asked=TERMS, objective=OBJECTIVE, members=())


def candidate(name: str) -> Candidate:
    return Candidate(f"k-{name}", name, "folder", f"/in/{name}", "full", 1)


def row(name: str, fate: RowFate, judged: int) -> MemberFate:
    return MemberFate(f"k-{name}", name, fate, "r", f"{name}: said", judged, -0.5)


def brought(name: str) -> BroughtFold:
    return BroughtFold(candidate(name), f"d-{name}", FoldNumbers(tau_norm=2.0, weight=0.5))


def select(*rows: MemberFate, **merge: Any) -> SelectEntry:
    return SelectEntry(
        of=0, objective="blake3:1", loss=0.5, before=1.0, gap=0.1, pool_gap=0.2, steps=3, scores=rows, **merge
    )
