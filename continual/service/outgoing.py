"""What goes out, in which form and where to: the merge, or a view of it. Which record that is, and when, is decided by
who asks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from continual.config import CanarySettings, ReleaseSettings, Settings
from continual.engine.views import ReadView, view_of

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.api.looked_state import LookedState
    from continual.publish.diffusion import LoraFormat

What = Literal["publish", "release"]
"""By which way something goes out: the link `current` is pointed at it (`publish`), or it is released on the Hub."""


@dataclass(frozen=True, slots=True)
class OutPlan:
    """What goes out: the merge, or a `view` of it. `current`: the link that is kept pointing at it; `asked`: where it
    is released to and how; `as_lora`, `layout`: as an adapter of this rank in this layout, else as a whole model.
    `canary`: as what it goes out first. `earlier`: an export of which the bytes of tensors that are the same are taken,
    beside those of `current`. `backwards`: whether it may take the place of a later record. `request`: whether it is
    proposed by a pull request, `merges`: the number of the one that is merged first."""

    asked: ReleaseSettings
    current: Path | None
    view: ReadView | None = None
    as_lora: int | Literal["own"] | None = None
    layout: LoraFormat = "peft"
    canary: CanarySettings | None = None
    earlier: Path | None = None
    backwards: bool = False
    request: bool = False
    merges: int | None = None

    @property
    def name(self) -> str | None:
        """The name of the view, None for the merge."""
        return None if self.view is None else self.view.name

    @property
    def outlets(self) -> tuple[What, ...]:
        """By which ways it goes out."""
        found: list[What] = ["publish"] if self.current is not None else []
        return (*found, "release") if self.asked.repo is not None else tuple(found)

    def as_candidate(self, *, backwards: bool = False) -> OutPlan:
        """The same as a canary: at the link beside `current`, and on a branch of its own, untagged, or proposed."""
        assert self.canary is not None
        branch = self.asked.branch if self.canary.request else self.canary.branch
        asked = self.asked.model_copy(update={"branch": branch, "tag": None})
        link = None if self.current is None else candidate_link(self.current)
        found = replace(self, asked=asked, current=link, earlier=self.current, backwards=backwards)
        return replace(found, request=self.canary.request)

    def as_promoted(self, merges: int | None = None) -> OutPlan:
        """The same where its canary is promoted to: tensors are copied from there; `merges`: the pull request that it
        waits in."""
        earlier = None if self.current is None else candidate_link(self.current)
        return replace(self, earlier=earlier, merges=merges)


def candidate_link(current: Path) -> Path:
    """The link that is kept at the canary for the link `current`."""
    return current.with_name(f"{current.name}-candidate")


def outgoing(settings: Settings, view: str | None = None) -> OutPlan:
    """What the settings say of the merge, or of a view. Raises Misconfigured where they know no such view."""
    if view is None:
        return OutPlan(settings.release, settings.current, canary=settings.release.canary)
    found, said = view_of(settings, view), settings.views[view]
    asked = settings.release.model_copy(update={"repo": said.repo, "every": False})
    return OutPlan(asked, said.current, found, said.as_lora, said.format, said.canary)


def mark_of(merge: Merge, out: OutPlan, seq: int, dtype: str | None = None) -> str:
    """A digest of what is read at record `seq`, and of the settings that say in which form it goes out: where it is the
    same, the same is out. Raises Misconfigured for what cannot be read."""
    said = [merge.contents(out.view, at=seq), out.as_lora, out.layout, dtype, merge.settings.tokenizer]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def write(merge: Merge, out: OutPlan, seq: int, directory: Path, mark: str, dtype: str | None = None) -> Path:
    """Writes record `seq` into `directory`, which must not exist, in its form; returns it. Raises Misconfigured, Retry
    and Halt; then nothing is left behind."""
    from continual.publish.folder import Target
    from continual.publish.lora import LoraTarget

    if out.as_lora is None:
        whole = Target(directory, at=seq, dtype=dtype, mark=mark, earlier=out.earlier or out.current)
        return merge.export(whole, view=out.view)
    rank = None if out.as_lora == "own" else out.as_lora
    target = LoraTarget(directory, rank, dtype or "F32", out.layout, at=seq, mark=mark)
    return merge.export_lora(target, out.view).directory


def models_in(merge: LookedState, out: OutPlan, seq: int) -> list[str]:
    """The names of the models that are read at record `seq`, in the order of their folds. Raises Misconfigured."""
    folds = merge.state.ledger.folds(at=seq)
    if merge.state.format.form is not None and folds and out.view is not None:
        kept = out.view.kept(folds)
        folds = [fold for fold in folds if fold.entry.candidate.key in kept]
    return [fold.entry.candidate.name for fold in folds]
