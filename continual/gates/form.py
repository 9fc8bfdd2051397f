"""Whether a state that keeps adapters as they are can keep this model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from continual.errors import Refuse
from continual.gates.contract import AtHeaders, Headers
from continual.outside import few
from continual.tensors import Adapter
from continual.tensors.kept import is_kept
from continual.tensors.matching import naming_of, sources
from continual.tensors.same_layout import in_layout_of
from continual.tensors.thin import is_thin


@dataclass(frozen=True)
class FormGate(AtHeaders):
    """In a state that keeps adapters as they are, refuses full fine-tunes, and adapters that change a tensor by more
    than a product of two thin factors: that takes the weights of the base, which such a state does not read. In other
    states it lets everything pass.

    `whole`: `leave-out` folds the thin factors of an adapter that also brings other changes, and leaves these out.
    """

    name = "form"
    reasons = ("form",)

    whole: Literal["refuse", "leave-out"] = "refuse"

    def judge(self, seen: Headers) -> Headers | None:
        """Finds which changes of an adapter stay out. Raises Refuse (`form`)."""
        if not is_kept(seen.base):
            return None
        model = seen.model
        if not isinstance(model, Adapter):
            raise Refuse(
                "form",
                f"{model.place}: is a full fine-tune, and this state keeps adapters: fold it into a state made "
                "without --adapters, or extract a LoRA adapter from it and publish that",
            )
        assert seen.lineage is not None, "the gate on lineage comes first"
        found, _ = sources(seen.base, in_layout_of(seen.base, model), naming_of(seen.lineage))
        whole = [name for name in seen.lineage.folded if not is_thin(found[name])]
        if not whole:
            return None
        thin = tuple(name for name in seen.lineage.folded if name not in whole)
        said = (
            f"{model.place}: changes {few(whole)} by more than a product of two thin factors (a whole weight, DoRA, "
            "trained tokens, …), which takes the weights of the base; this state keeps adapters and does not read them"
        )
        if not thin:
            raise Refuse("form", f"{said}: fold it into a state that was made without --adapters")
        if self.whole == "refuse":
            raise Refuse(
                "form",
                f"{said}: fold it into a state that was made without --adapters; or gates.form.whole = leave-out folds "
                "the rest without it",
                by=("whole",),
            )
        unchanged = tuple(sorted({*seen.lineage.unchanged, *whole}))
        extra = (*seen.lineage.extra, *whole)
        return seen._replace(lineage=replace(seen.lineage, folded=thin, unchanged=unchanged, extra=extra))
