"""Keeping a link at the newest export of the merge, or of a view: what is written, and what is there already. What a
view reads changes less often than the merge: it is put out again only when that, or its form, is other than what is
out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Set
from pathlib import Path
from typing import NamedTuple

from continual.api import Merge
from continual.publish import folder
from continual.publish.lora import LoraTarget
from continual.service.outgoing import OutPlan, mark_of, models_in, write

Served = Set[str]
"""The marks of the adapters that servers were given last. A server that has more adapters than memory for them reads
one again from its directory; vLLM ends where that is gone."""


class Put(NamedTuple):
    """What a link points at: the export, its record and its mark; `new`: whether it was put there just now."""

    directory: Path
    seq: int
    mark: str
    new: bool


def put(merge: Merge, out: OutPlan, seq: int, served: Served | None = None) -> Put | None:
    """Points the link at an export of record `seq`, or of an earlier one that a view reads the same at; None where
    nothing is folded that a view reads, and there is no link. `served`: which adapters stay besides the one before;
    None: no server reads them. Raises Misconfigured, Retry and Halt."""
    link = out.current
    assert link is not None
    if out.view is not None and not link.is_symlink() and not models_in(merge, out, seq):
        return None
    mark = mark_of(merge, out, seq)
    before = link.resolve()
    if out.view is not None and _is_out(merge, link, mark):
        was = folder.provenance_in(link).get("seq")
        return Put(before, was if isinstance(was, int) else seq, mark, new=False)
    time = merge.state.ledger.get(seq).time
    stays = None if served is None else _among(served)
    directory = folder.keep_current(link, seq, lambda place: write(merge, out, seq, place, mark), time, mark, stays)
    return Put(directory, seq, mark, new=directory.resolve() != before)


def put_beside(merge: Merge, out: OutPlan, seq: int, mark: str, rank: int, served: Served) -> Path:
    """The adapter of this rank beside a whole model that is out with this mark, which has what is read at record `seq`;
    kept as `LINK-lora`. `served`: as in `put`. Raises Misconfigured, Retry and Halt."""
    link = out.current
    assert link is not None
    beside = link.with_name(f"{link.name}-lora")
    marked = _mark_beside(mark, rank)
    if out.view is not None and _is_out(merge, beside, marked):
        return beside.resolve()

    def export(directory: Path) -> Path:
        return merge.export_lora(LoraTarget(directory, rank, at=seq, mark=marked), out.view).directory

    time = merge.state.ledger.get(seq).time
    stays = _among({_mark_beside(one, rank) for one in served})
    return folder.keep_current(beside, seq, export, time, marked, stays)


def _mark_beside(mark: str, rank: int) -> str:
    return hashlib.sha256(f"{mark} {rank}".encode()).hexdigest()[:32]


def _among(served: Served) -> Callable[[Path], bool]:
    """Whether a directory has one of these."""
    return lambda directory: folder.provenance_in(directory).get("mark") in served


def _is_out(merge: Merge, link: Path, mark: str) -> bool:
    """Whether a link points at an export of this state that has this mark."""
    there = folder.provenance_in(link)
    return (there.get("state"), there.get("mark")) == (merge.state.id, mark)
