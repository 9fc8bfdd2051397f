"""Whether a state that keeps adapters as they are can keep this model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from continual.errors import Halt, Refuse
from continual.gates.contract import AtHeaders, Headers
from continual.outside import few
from continual.tensors import Adapter, BaseModel
from continual.tensors.bases.kept import is_kept
from continual.tensors.layouts.same_layout import in_layout_of
from continual.tensors.matched.matching import naming_of, sources
from continual.tensors.vectors.thin import needs_base, without_copy


@dataclass(frozen=True)
class FormGate(AtHeaders):
    """In a state that keeps adapters as they are, refuses full fine-tunes, and adapters whose changes depend on the
    weights of the base (whole weights, DoRA, trained tokens) where these are not to be read. In other states it lets
    everything pass.

    `whole`: `fold` reads the weights of the base that such an adapter takes, where they can be read; `leave-out` leaves
    these changes out and folds the rest, of a weight that was saved beside its factors these; `refuse` keeps the
    adapter out.
    """

    name = "form"
    reasons = ("form",)

    whole: Literal["fold", "leave-out", "refuse"] = "fold"

    def judge(self, seen: Headers) -> Headers | None:
        """Opens the weights of the base for an adapter that takes them, or finds which of its changes stay out. Raises
        Refuse (`form`), Retry."""
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
        whole = [name for name in seen.lineage.folded if needs_base(found[name])]
        if not whole:
            return None
        said = (
            f"{model.place}: changes {few(whole)} by something that depends on the weights of the base (a whole "
            "weight, DoRA, trained tokens, …)"
        )
        thin = tuple(name for name in seen.lineage.folded if not needs_base(without_copy(found[name])))
        rest = "; or gates.form.whole = leave-out folds the rest without it" if thin else ""
        if self.whole == "fold":
            return seen._replace(weights=self._weights(seen, said))
        if self.whole == "refuse" or not thin:
            raise Refuse(
                "form",
                f"{said}: gates.form.whole = fold reads them, or fold it into a state that was made without "
                f"--adapters{rest if self.whole == 'refuse' else ''}",
                by=("whole",),
            )
        unchanged = tuple(sorted({*seen.lineage.unchanged, *whole} - {*thin}))
        copies = {name: full.name for name in whole if name in thin and (full := found[name].full) is not None}
        extra = (*seen.lineage.extra, *(copies.get(name, name) for name in whole))
        return seen._replace(lineage=replace(seen.lineage, folded=thin, unchanged=unchanged, extra=extra))

    def _weights(self, seen: Headers, said: str) -> BaseModel:
        """The base with its weights. Raises Refuse (`form`) where they cannot be read, Retry where they cannot now."""
        assert seen.open_weights is not None, "the engine of such a state opens the weights of its base"
        try:
            return seen.open_weights()
        except (Halt, Refuse) as error:
            raise Refuse(
                "form",
                f"{said}, and they cannot be read ({error}); once they can, 'continual retry' has it looked at again; "
                "gates.form.whole = leave-out folds the rest of an adapter without them",
                by=("whole",),
            ) from None
