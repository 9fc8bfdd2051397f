"""What `continual.json` says of an export: what it was made of, and how it was read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from continual.engine.block_reading import BlockReading
from continual.engine.explaining import Explanation
from continual.engine.models_read import models_read
from continual.engine.reading import Reading
from continual.engine.views import ReadView
from continual.publish.share_columns import ShareFigures
from continual.state.parts import ReleasedShare
from continual.state.software import software

_ROWS = 4000
"""Layers times models of which an export says what each has; a thousand of them are some 40 kB."""
_FIGURES = ("weight", "norm", "cosine", "change")
_KEPT = ("key", "name", "origin", "revision", "form")


def provenance_of(reading: Reading, factor: float, shares: Explanation | None) -> dict[str, object]:
    """The body of `continual.json`: which state and record, which base, rule and options, every fold in it with the
    weight that it is read with (null: not at all), what was read of it where it was not all (`view`), and a digest of
    that (`contents`). Of a state of adapters also of which models a part was cut off (`cut`). What each model has
    (`shares`, `shares_by_layer`), where that is given."""
    state, commit = reading.state, reading.commit
    seq = commit.seq
    made = state.format
    more: dict[str, object] = {"contents": reading.contents}
    if reading.view != ReadView():
        more["view"] = reading.view.described()
    if isinstance(reading, BlockReading) and (cut := reading.cut()):
        more["cut"] = [one._asdict() for one in cut]
    if shares is not None:
        more |= _shares(shares)
    weights = {(model.seq, model.key): model.weight for model in models_read(reading)}
    return {
        "state": state.id,
        "cloned": list(state.ledger.cloned),
        "seq": seq,
        "crc": commit.crc,
        "generation": commit.generation,
        "time": commit.time,
        "base": {"path": made.base.path, "repo": made.base.repo, "revision": made.base.revision},
        "rule": made.rule,
        "options": dict(made.options),
        "read": reading.options.to_mapping() | {"factor": factor},
        "totals": state.ledger.totals_at(seq).body() if state.ledger.folds(at=seq) else {},
        "folded": [
            {
                "seq": fold.seq,
                "digest": fold.entry.digest,
                "weight": weights.get((fold.seq, fold.entry.candidate.key)),
                **{k: getattr(fold.entry.candidate, k) for k in _KEPT},
            }
            for fold in state.ledger.folds(at=seq)
        ],
        **more,
        "software": dict(software()),
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _shares(found: Explanation) -> dict[str, object]:
    """What an export says of what each model has: of the whole, and of each layer as the record of the fold, share,
    cosine and change, unless there are very many."""
    figures = ("name", "seq", "weight", "norm", "cosine", "change")
    said: dict[str, object] = {"shares": [{key: getattr(one, key) for key in figures} for one in found.models]}
    if found.error is not None:
        said["shares_error"] = {"whole": found.error[0], "layer": found.error[1]}
    if 0 < sum(len(layer.models) for layer in found.layers) <= _ROWS:
        said["shares_by_layer"] = [
            {
                "name": layer.name,
                "depth": layer.depth,
                "models": [[one.seq, *map(_short, (one.norm, one.cosine, one.change))] for one in layer.models],
            }
            for layer in found.layers
        ]
    return said


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def figures_in(said: Mapping[str, object]) -> dict[int, ShareFigures]:
    """Share, cosine and change of each model by the record of its fold, as a `continual.json` has them in its `shares`;
    nothing where it says nothing of them."""
    rows = said.get("shares")
    found: dict[int, ShareFigures] = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and isinstance(seq := row.get("seq"), int):
            found[seq] = ShareFigures(*(_figure(row.get(key)) for key in ("norm", "cosine", "change")))
    return found


def _figure(value: object) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(str(value)) if known else None


def shares_in(said: Mapping[str, object]) -> tuple[ReleasedShare, ...] | None:
    """The `shares` of a `continual.json`, without rows that are none; None where it says nothing of them, or not all
    of it, as of a merge of whole tensors."""
    rows = said.get("shares")
    if not isinstance(rows, list):
        return None
    found = tuple(found for row in rows if (found := _share(row)) is not None)
    return None if rows and not found else found


def _share(row: object) -> ReleasedShare | None:
    """A row of `shares`; None for what is none."""
    if not isinstance(row, Mapping):
        return None
    found = {key: float(str(row[key])) for key in _FIGURES if isinstance(row.get(key), int | float)}
    if len(found) < len(_FIGURES) or not all(map(math.isfinite, found.values())):
        return None
    return ReleasedShare(name=str(row.get("name")), **found)
