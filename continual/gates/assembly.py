"""Whether the folders of a model in parts are those of the base, and do the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.gates.contract import AtHeaders, Headers
from continual.tensors import Adapter
from continual.tensors.adapters.loras.targets import prefixes
from continual.tensors.checkpoints.compound import PIPELINE, differing, manifest_of
from continual.tensors.checkpoints.foreign import release_of


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
        _check_release(seen)
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


def _check_release(seen: Headers) -> None:
    """Raises Refuse (`assembly`) where one of base and model is a diffusion model in the layout of its release, in one
    file, and the other one in that of diffusers."""
    if isinstance(seen.model, Adapter):
        return
    theirs, ours = release_of(seen.model.tensors), release_of(seen.base.checkpoint.tensors)
    if theirs is not None and ours is None and prefixes(seen.base):
        raise Refuse(
            "assembly",
            f"{seen.model.place}: is a diffusion model in the layout of its release, as ComfyUI has it (tensor "
            f"{theirs.tensor}), and the base in that of diffusers: load it with {theirs.reader}.from_single_file of "
            "diffusers, call save_pretrained, and publish what that writes",
        )
    config = seen.model.config
    if ours is not None and theirs is None and ("_class_name" in config or manifest_of(seen.model.place) == PIPELINE):
        raise Refuse(
            "assembly",
            f"{seen.model.place}: is in the layout of diffusers, and the base of this state in that of its release "
            f"(tensor {ours.tensor}): make a state of the base as {ours.reader}.from_single_file of diffusers and "
            "save_pretrained write it",
        )
