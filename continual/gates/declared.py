"""Whether a model's card says that it was made from this base, and by training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from continual.config.values import Texts
from continual.errors import Refuse
from continual.gates.contract import AtFold, Doubt, Headers
from continual.gates.kinship import repo_of, stem
from continual.gates.model_card import CARD, ModelCard, card_of
from continual.outside import few, shown
from continual.tensors import Adapter

_KINDS = {"merge": "a merge of several models", "quantized": "a quantised copy"}


@dataclass(frozen=True)
class CardGate(AtFold, Doubt):
    """Tells of a model whose card (`base_model`, `base_model_relation` in README.md) names another base than that of
    the state, or says that it is a merge or a quantised copy. Names of repos are compared as those in the configuration
    of an adapter are (kinship.py), for which the setting `lineage` is; paths say nothing.

    `act`: `warn` by default, since many a card names the model that another fine-tune began with. `names`: further
    repos that count as the base. `kinds`: relations that are told of.
    """

    name = "card"
    reasons = ("card-base", "card-kind", "card")

    act: Literal["refuse", "warn", "off"] = "warn"
    names: Texts = ()
    kinds: Texts = ("merge", "quantized")

    def judge(self, seen: Headers) -> None:
        """Raises Refuse: `card-base`, `card-kind`, and `card` where its metadata cannot be read; Retry."""
        if self.act == "off":
            return
        try:
            card = card_of(seen.model.place)
        except Refuse as refusal:
            if refusal.reason == "card":
                refusal.by = ("kinds",)
            raise
        self._check_kind(seen, card)
        if not isinstance(seen.model, Adapter):
            self._check_base(seen, card)

    def _check_kind(self, seen: Headers, card: ModelCard) -> None:
        if card.relation is None or card.relation not in self.kinds:
            return
        what = _KINDS.get(card.relation, f"'{shown(card.relation)}'")
        raise Refuse(
            "card-kind",
            f"{seen.model.place.file(CARD)}: says that {seen.candidate.name} is {what} "
            f"({few(map(shown, card.bases)) or 'no base_model is named'}), no fine-tune; take '{shown(card.relation)}' "
            "out of gates.card.kinds to hear nothing of such",
            by=("kinds",),
        )

    def _check_base(self, seen: Headers, card: ModelCard) -> None:
        theirs = [repo for one in card.bases if (repo := repo_of(one)) is not None]
        base = seen.repo or repo_of(str(seen.base.checkpoint.place))
        known = {stem(name) for name in (*self.names, *((base,) if base else ()))}
        if not theirs or not known or known & {stem(repo) for repo in theirs}:
            return
        raise Refuse(
            "card-base",
            f"{seen.model.place.file(CARD)}: names {few(map(shown, theirs))} as the base of {seen.candidate.name}, and "
            f"that of this state is {base or few(self.names)}: what it learned besides would be merged too; if it is "
            "the same model, or one trained from it, add it to gates.card.names",
            by=("names",),
        )
