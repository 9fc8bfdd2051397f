"""What the pages show of the past, as frozen records: folds, models, evaluations, generations, settings. Where it comes
from is for `continual/service/past.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from continual.service.web.view import ShownFold, ShownRefusal, ShownShare


@dataclass(frozen=True, slots=True)
class RowsWanted:
    """Which rows of a list are asked for: those whose place or key has `search` in it (in any case), from record
    `before` backwards (None: the newest); at most `limit`."""

    search: str = ""
    before: int | None = None
    limit: int = 50


@dataclass(frozen=True, slots=True)
class RecalledFold:
    """A fold of the past. `fate`: what has become of it by now, in words; `in_force`: whether it is in the merge.
    `part`: which of the models that came in one record it is, from 0. `kept`: the share of ‖τ‖² that is in the merge,
    where a part was cut off or projected away; `merged_norm`: of the merged task vector after it. `conflict`: of a few
    matrices, the share of Σ|τ| where the merge before it has the other sign."""

    shown: ShownFold
    fate: str
    in_force: bool
    part: int
    kept: float | None
    merged_norm: float | None
    conflict: float | None


@dataclass(frozen=True, slots=True)
class FoldList:
    """Folds, the newest first. `count`: how many there are of all that was asked for; `before`: where the next page
    begins, None at the end."""

    rows: tuple[RecalledFold, ...]
    count: int
    before: int | None


@dataclass(frozen=True, slots=True)
class RefusalList:
    """Refusals, as `FoldList`."""

    rows: tuple[ShownRefusal, ...]
    count: int
    before: int | None


@dataclass(frozen=True, slots=True)
class GroupChange:
    """What a fold changed in a group of layers: the first of their names, the length of its task vector there, the
    share of ‖τ‖² that lies there, and its cosine with the merge before it there (None: its record does not say it)."""

    name: str
    norm: float
    share: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class PlacedShare:
    """What a model has in what is out at a `place`, at record `seq`."""

    place: str
    seq: int
    share: ShownShare


@dataclass(frozen=True, slots=True)
class RecalledWarning:
    """What a gate found that only warns."""

    gate: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class RecalledEvaluation:
    """The metrics of the merge with a model in it, without it, and of the base; and how sure each difference is."""

    seq: int
    time: str
    model: str
    verdict: str | None
    after: Mapping[str, float]
    before: Mapping[str, float]
    of_base: Mapping[str, float]
    errors: Mapping[str, float]
    rows: int | None


@dataclass(frozen=True, slots=True)
class AboutFold:
    """All that is told of a fold. `back`: whether the state can still go back to it; `older`, `newer`: the records of
    the folds beside it. `length_share`: of the lengths of all task vectors in the merge, `weight_share`: of all
    weights, `mean_norm`: the mean length; None where it is not in the merge. `gauges` and `notes`: what the rule
    measured, by its own names. `overlap`: of a few matrices, the share of ‖τ‖² along the leading directions of the
    merge before it."""

    fold: RecalledFold
    kind: str
    key: str
    origin: str
    digest: str
    nbytes: int
    licence: str | None
    tags: tuple[str, ...]
    back: bool
    older: int | None
    newer: int | None
    base_norm: float | None
    mean_norm: float | None
    length_share: float | None
    weight_share: float | None
    tensors: int | None
    unchanged: int | None
    gauges: Mapping[str, float]
    notes: Mapping[str, float]
    groups: tuple[GroupChange, ...]
    overlap: float | None
    conflict: float | None
    out: tuple[PlacedShare, ...]
    warnings: tuple[RecalledWarning, ...]
    evaluated: RecalledEvaluation | None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A record about a model."""

    seq: int
    time: str
    kind: str
    fate: str | None
    reason: str | None
    message: str | None


@dataclass(frozen=True, slots=True)
class AboutModel:
    """All that is told of a model. `id` stands for its key. `fate`: what it is by now (folded, refused, duplicate,
    expired, unfolded, rolled-back, deferred or open), with the reason and the sentence; `settled`: the record that says
    so. `records`: the newest first, of `count`; `fold`: the newest fold of it; `waits`: what is said of it where it
    waits for another try or for a round."""

    id: str
    key: str
    name: str
    origin: str
    form: str
    nbytes: int
    licence: str | None
    fate: str
    reason: str | None
    message: str | None
    settled: int | None
    settings: Mapping[str, object]
    records: tuple[ModelRecord, ...]
    count: int
    fold: RecalledFold | None
    waits: str


@dataclass(frozen=True, slots=True)
class LayerColumn:
    """A fold in the picture: its record, its model, and the length of its task vector in each group of layers."""

    seq: int
    model: str | None
    norms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerPicture:
    """What each of the newest folds changed, by groups of layers: their names from the first down to the last, and a
    column for each fold, the oldest first. Folds whose record does not say it are left out."""

    groups: tuple[str, ...]
    columns: tuple[LayerColumn, ...]


@dataclass(frozen=True, slots=True)
class KeptGeneration:
    """A generation on the disk: the first and the last record that hold it, when it was made, the bytes of its files
    (a file that several generations share counts in each), the tags that keep it, and whether it is in force."""

    name: str
    first: int
    last: int
    time: str
    nbytes: int
    tags: tuple[str, ...]
    in_force: bool


@dataclass(frozen=True, slots=True)
class SettingInForce:
    """A setting by its whole name, as people read its value; `changed`: it is not the default."""

    name: str
    value: str
    changed: bool
