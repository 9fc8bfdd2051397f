"""Whether the folders of a model in parts are those of the base, and do the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.gates.contract import AtHeaders, Headers
from continual.tensors import Adapter
from continual.tensors.compound import PIPELINE, differing, manifest_of


@dataclass(frozen=True)
class AssemblyGate(AtHeaders):
    """Refuses a model of sentence-transformers or a pipeline of diffusers that is put together in another way than the
    base.

    `differ`: `base` lets in a model whose settings say something else; the merge keeps the base's.
    """

    name = "assembly"
    reasons = ("assembly", "config")

    differ: Literal["refuse", "base"] = "refuse"

    def judge(self, seen: Headers) -> None:
        """Raises Refuse: `assembly`, and `config` where settings are malformed; Retry."""
        theirs, ours = seen.model.place, seen.base.checkpoint.place
        manifest = manifest_of(theirs)
        if manifest is None:
            return
        base = manifest_of(ours)
        if manifest == PIPELINE and base != PIPELINE:
            raise Refuse(
                "assembly",
                f"{theirs}: is a whole pipeline, and the base of this state is one model: publish the folder of that "
                "component alone",
            )
        weights = seen.model.weights if isinstance(seen.model, Adapter) else seen.model
        known = {part.prefix for part in seen.base.checkpoint.parts}
        more = next((part for part in weights.parts if part.prefix not in known), None)
        if more is not None and base is not None:
            raise Refuse(
                "assembly",
                f"{theirs.file(more.folder)}: holds weights, and the base has none there: they would be lost; publish "
                "the model without that folder, or make a new state of a base that has it",
            )
        if self.differ == "refuse" and (what := differing(ours, theirs)) is not None:
            raise Refuse(
                "assembly",
                f"{theirs}: {what}: it computes something else with its weights; gates.assembly.differ = base folds "
                "the weights alone and keeps the base's settings",
                by=("differ",),
            )
