"""Records of the ledger for people, from their JSON: one whole, in words; or many, a row each within 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from continual.cli.console import table
from continual.outside import few
from continual.texts import minute, share, size, when

Body: TypeAlias = Mapping[str, Any]
_WORDS = {
    "seq": "record",
    "crc": "checksum of the record",
    "prev": "checksum of the one before",
    "candidate": "model",
    "bytes": "size",
    "digest": "digest of its tensors",
    "totals": "totals of the merge",
    "numbers": "figures",
    "tau_norm": "length of its task vector",
    "base_norm": "length of the base",
    "merged_norm": "length of the merge with it",
    "cosine": "cosine with the merge before",
    "matrix_norm": "its length, matrices",
    "plain_norm": "its length, all else",
    "spread_norm": "how spread its matrices are",
    "stands_out": "how far it stands out of noise",
    "block": "number among the adapters",
    "cut": "cut off to fit the width",
    "tensors": "tensors that it has",
    "unchanged": "tensors that it lacks",
    "extra": "tensors left out",
    "extra_count": "how many were left out",
    "narrowed": "base cast before subtracting",
    "rows": "rows matched",
    "renamings": "named otherwise",
    "tokens": "rows matched by token",
    "met": "how it lies to the merge",
    "cosines": "cosines by layer group",
    "removed": "taken away by the projection",
    "sampled": "layer groups of some matrices",
    "overlap": "along what the merge has most",
    "conflict": "with the other sign",
    "notes": "notes of the rule",
    "count": "models",
    "norm_sum": "sum of their lengths",
    "merged_sq": "square of the merge's length",
    "matrix_norm_sum": "sum of lengths, matrices",
    "plain_norm_sum": "sum of lengths, all else",
    "spread_sum": "sum of how spread they are",
    "seconds": "seconds by stage",
}
"""The fields of a record whose names say little."""


def whole(body: Body) -> None:
    """One record, a field a line; what is not set is left out."""
    table(("field", "value"), _fields(body, 0))


def _fields(body: Body, depth: int) -> Iterator[tuple[str, str]]:
    for key, value in body.items():
        if value in (None, "", [], {}) or (isinstance(value, list) and not any(value)):
            continue
        if key == "cosine" and value == 0.0:  # the first fold meets nothing; earlier versions wrote that as 0
            continue
        name = "  " * depth + _WORDS.get(key, key.replace("_", " "))
        if isinstance(value, Mapping):
            yield name, ""
            yield from _fields(value, depth + 1)
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value, 1):
                yield f"{name} {number}", ""
                yield from _fields(one if isinstance(one, Mapping) else {"value": one}, depth + 1)
        else:
            yield name, _text(key, value)


def _text(key: str, value: object) -> str:
    """A value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_text("", one) for one in value)
    if isinstance(value, int | float) and (key == "bytes" or key.endswith("_bytes")):
        return size(value)
    if isinstance(value, str) and (key == "time" or key.endswith("_time")):
        return when(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def many(bodies: Iterable[Body]) -> None:
    """A row each: number, time, whether it can be gone back to (where that was asked), and what happened."""
    found = list(bodies)
    back = any("back" in body for body in found)
    table(
        ("seq", "time", *(("back",) if back else ()), "what"),
        [
            (b["seq"], minute(b["time"]), *(("yes" if b.get("back") else "",) if back else ()), _happened(b))
            for b in found
        ],
    )


def model_of(body: Body) -> str:
    """The name of the candidate that a record is about; empty where it is about none."""
    return str((body["candidate"] or {}).get("name", ""))


def _happened(body: Body) -> str:
    """What a record says: of a candidate its fate, of a fold with its figures; of anything else its message."""
    name, message = model_of(body), str(body.get("message") or "")
    if body["kind"] == "fold":
        return f"folded {name}: {_measured(body['numbers'])}"
    if not name:
        return ": ".join(part for part in (body["kind"], message) if part)
    reason = body.get("reason")
    fate = body.get("fate") or body["kind"]
    told = message.removeprefix(f"{name}: ")
    return f"{fate} {name}{f' ({reason})' if reason and reason != fate else ''}{f': {told}' if told else ''}"


def _measured(found: Body) -> str:
    """The figures of a fold."""
    told = f"norm {found['tau_norm']:.4g}"
    if found.get("cosine"):  # neither None nor the 0 that earlier versions wrote of a first fold
        told += f", cosine {found['cosine']:+.3f}"
    elif found.get("weight") is not None:
        told += f", weight {found['weight']:.4g}"
    told += f", cut {share(found['cut'])}" if found.get("cut") else ""
    told += f", lambda {found['lambda']:.3f}" if "lambda" in found else ""
    out = few(found.get("extra") or (), found.get("extra_count"))
    told += f"; left out: {out}" if out else ""
    warned = ", ".join(one["reason"] for one in found.get("warnings") or ())
    return told + (f"; warned: {warned}" if warned else "")
