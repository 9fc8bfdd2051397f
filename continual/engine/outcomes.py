"""The frozen records that the engine takes and returns: a candidate with its files open, an outcome, a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from continual.gates import Headers
from continual.outside import few, few_shares
from continual.records import Candidate, Lineage, Totals, Warned
from continual.state import Commit
from continual.state.entries import RefuseEntry
from continual.state.fields import body_of
from continual.state.parts import FoldNumbers, MatchedRows
from continual.tensors import BaseModel, Model
from continual.tensors.vectors.sketch import Sketch

_SETTING = re.compile(
    r"\b(?:missing|vocab|lineage|tied|updates|max_base_ratio|max_mean_ratio|weight) = |lineage\.(?:extra|carried)="
)
"""How a refusal names the setting that decided it."""


class OpenCandidate(NamedTuple):
    """A candidate that the gates have let in, with its files open, and the weight it is folded with. `weights`: the
    base with its weights, where a state keeps none and the candidate takes them. `warnings`: of gates that only warn.
    """

    candidate: Candidate
    model: Model
    lineage: Lineage
    weight: float = 1.0
    weights: BaseModel | None = None
    warnings: tuple[Warned, ...] = ()

    @classmethod
    def of(cls, seen: Headers) -> OpenCandidate:
        """From what the gates have seen of its headers."""
        assert seen.lineage is not None, "the gate on lineage has not been asked"
        return cls(seen.candidate, seen.model, seen.lineage, seen.weight, seen.weights, seen.warnings)


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What one fold did, measured while its tensors streamed by. `seconds`: wall time by stage, added over workers.
    `cut`: as the gates are shown it (`Numbers`). `others`: what was cut off of the models that were there to make room,
    as shares of the squares of their lengths; of a state of adapters. `sketch`: of the task vector; `squares`: ‖τ‖² of
    each tensor that it changes. `grids`: as the gates are shown them. `warnings`: of gates before the fold."""

    candidate: Candidate
    digest: str
    lineage: Lineage
    totals: Totals
    numbers: FoldNumbers
    seconds: Mapping[str, float]
    bytes_read: int
    device: str
    cut: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)
    sketch: Sketch | None = None
    squares: Mapping[str, float] = field(default_factory=dict)
    grids: tuple[str, ...] = ()
    warnings: tuple[Warned, ...] = ()

    @property
    def tokens_left_out(self) -> str:
        """What was not folded of a vocabulary whose rows were matched by token, for people; empty where that is
        nothing."""
        return "; ".join(dict.fromkeys(said for rows in self.numbers.tokens or () if (said := tokens_said(rows))))

    @property
    def left_out(self) -> str:
        """Names of the candidate's tensors that are not folded, the first of them, for people; empty where there are
        none."""
        return few(self.numbers.extra or (), self.numbers.extra_count)

    @property
    def cut_others(self) -> str:
        """What was cut off of models that were there, the largest shares first, for people; empty where nothing was."""
        return few_shares(self.others)

    def figures(self) -> dict[str, float]:
        """What a log line says of it, rounded: `tau_norm`, `cosine`, `lambda` of a rule that has it, and `cut`."""
        found = {"tau_norm": self.numbers.tau_norm, "cosine": self.numbers.cosine, **self.numbers.gauges}
        found["cut"] = self.numbers.cut or None
        shown = ("tau_norm", "cosine", "lambda", "cut")
        return {key: round(value, 4) for key in shown if (value := found.get(key)) is not None}


class Outcome(NamedTuple):
    """What became of a candidate.

    `known`: its fate was settled earlier, or it waits already; `commit` is then that earlier record.
    """

    fate: Literal["folded", "refused", "duplicate", "deferred", "known"]
    name: str
    message: str
    reason: str | None
    commit: Commit
    report: FoldReport | None = None

    @property
    def key(self) -> str | None:
        """The candidate's key."""
        return self.commit.entry.candidate.key if self.commit.entry.candidate else None

    @property
    def refused(self) -> bool:
        """Whether this model is kept out: it was refused now, or it was refused, rolled back or unfolded earlier."""
        return self.fate == "refused" or (
            self.fate == "known" and self.commit.entry.fate in ("refused", "expired", "rolled-back", "unfolded")
        )

    def line(self) -> str:
        """What happened, for people, in one line."""
        if self.report is None:
            return self.message + (after_that(self.name, self.commit) if self.fate == "refused" else "")
        n = self.report.numbers
        seconds = self.report.seconds.get("total", 0)
        cosine = "" if n.cosine is None else f"cosine {n.cosine:+.3f}, "
        cut = f"{n.cut:.2%} of its square cut off, " if n.cut else ""
        said = f"{self.message}: norm {n.tau_norm:.4g}, {cosine}{cut}{seconds:.2f} s"
        if others := self.report.cut_others:
            said += f"; cut off to make room, of the square of the length of others: {others}"
        if out := self.report.left_out:
            said += f"; left out, as this state has no place for it: {out}"
        lacking = self.report.lineage.lacking
        said += "".join(f"; warning ({one.gate}): {one.message}" for one in n.warnings or ())
        said += f"; {tokens}" if (tokens := self.report.tokens_left_out) else ""
        return said + (f"; as in the base, for it lacks them: {few(lacking)}" if lacking else "")

    def summary(self) -> dict[str, object]:
        """What happened, for machines."""
        body: dict[str, object] = {
            "model": self.name,
            "fate": self.fate,
            "reason": self.reason,
            "message": self.message,
            "seq": self.commit.seq,
        }
        if self.report is not None:
            body |= {
                "numbers": body_of(replace(self.report.numbers, sketch=None)),
                "seconds": self.report.seconds,
                "bytes_read": self.report.bytes_read,
                "cut_others": dict(self.report.others),
            }
        return body


@dataclass(frozen=True, slots=True)
class Plan:
    """What folding a candidate would take and whether it would be let in, from headers alone. Sizes in bytes."""

    name: str
    path: str
    form: str
    ok: bool
    reason: str | None
    message: str
    passes: float = 1.0
    read_bytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    folded: int = 0
    matrices: int = 0
    stacks: int = 0
    plain: int = 0
    unchanged: int = 0
    prefix: tuple[str, str] = ("", "")
    extra: tuple[str, ...] = ()
    narrowed: Mapping[str, str] = field(default_factory=dict)
    renamings: tuple[tuple[str, str], ...] = ()
    tokens: tuple[str, ...] = ()


def tokens_said(rows: MatchedRows) -> str:
    """Which tokens stay out of a fold, and which of the base's it leaves as they are."""
    said: list[str] = []
    if rows.left_out:
        said.append(f"left out, as the base has no such token: {few(rows.left_out, rows.left_out_count)}")
    if rows.lacking:
        said.append(f"unchanged, as it has no such token: {few(rows.lacking, rows.lacking_count)}")
    return "; ".join(said)


def after_that(name: str, refused: Commit) -> str:
    """What follows once a setting that a refusal names was changed; nothing where it names none. A record of an earlier
    version does not say which settings it went by: it stands until somebody asks for another look."""
    entry = refused.entry
    settings = entry.settings if isinstance(entry, RefuseEntry) else None
    if settings:
        doubted = any(one.startswith("evaluation.") or one.endswith(".act") for one in settings)
        accept = f"; 'continual quarantine accept {name} --because WHY' has it folded in spite of that"
        names = dict.fromkeys("evaluation" if one.startswith("evaluation.") else one for one in settings)
        return f"; a fold or run with another {' or '.join(names)} looks at it again" + (accept if doubted else "")
    message = entry.message or ""
    if entry.reason is None or not _SETTING.search(message) or f"continual retry {name}" in message:
        return ""
    return f"; after that: continual retry {name}"


def known_as(name: str, known: Commit) -> Outcome:
    """The outcome of a candidate whose fate was settled earlier."""
    message = f"{name}: already settled as record {known.seq} ({known.entry.fate})"
    if known.entry.message and known.entry.fate != "folded":
        message += f": {known.entry.message}"
        message += after_that(name, known)
    if known.entry.fate in ("unfolded", "rolled-back"):
        message += f"; 'continual retry {name}' has it folded again"
    return Outcome("known", name, message, known.entry.reason, known)
