"""What `continual.json` says of an export: what it was made of, and how it was read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from continual.engine.block_reading import BlockReading
from continual.engine.reading import Reading
from continual.engine.views import ReadView
from continual.state.parts import ReleasedShare
from continual.state.software import software

SHARES = 15
"""Models of a release whose shares a record keeps, and that a page shows."""
_FIGURES = ("weight", "norm", "cosine", "change")
_KEPT = ("key", "name", "origin", "revision", "form")


def provenance_of(reading: Reading, factor: float, shares: Sequence[Mapping[str, object]] | None) -> dict[str, object]:
    """The body of `continual.json`: which state and record, which base, rule and options, every fold in it, what was
    read of it where it was not all (`view`), and a digest of that (`contents`). Of a state of adapters also of which
    models a part was cut off (`cut`), and the `shares` where they are given."""
    state, commit = reading.state, reading.commit
    seq = commit.seq
    made = state.format
    more: dict[str, object] = {"contents": reading.contents}
    if reading.view != ReadView():
        more["view"] = reading.view.described()
    if isinstance(reading, BlockReading) and (cut := reading.cut()):
        more["cut"] = [one._asdict() for one in cut]
    if shares is not None:
        more["shares"] = shares
    return {
        "state": state.id,
        "cloned": list(state.ledger.cloned),
        "seq": seq,
        "generation": commit.generation,
        "time": commit.time,
        "base": {"path": made.base.path, "repo": made.base.repo, "revision": made.base.revision},
        "rule": made.rule,
        "options": dict(made.options),
        "read": reading.options.to_mapping() | {"factor": factor},
        "totals": state.ledger.totals_at(seq).body() if state.ledger.folds(at=seq) else {},
        "folded": [
            {"seq": fold.seq, "digest": fold.entry.digest, **{k: getattr(fold.entry.candidate, k) for k in _KEPT}}
            for fold in state.ledger.folds(at=seq)
        ],
        **more,
        "software": dict(software()),
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def shares_in(said: Mapping[str, object]) -> tuple[ReleasedShare, ...] | None:
    """The `shares` of a `continual.json`, without rows that are none; None where it says nothing of them."""
    rows = said.get("shares")
    if not isinstance(rows, list):
        return None
    return tuple(found for row in rows if (found := _share(row)) is not None)


def _share(row: object) -> ReleasedShare | None:
    """A row of `shares`; None for what is none."""
    if not isinstance(row, Mapping):
        return None
    found = {key: float(str(row[key])) for key in _FIGURES if isinstance(row.get(key), int | float)}
    if len(found) < len(_FIGURES) or not all(map(math.isfinite, found.values())):
        return None
    return ReleasedShare(name=str(row.get("name")), **found)
