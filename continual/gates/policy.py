"""Limits that a person sets for every model, wherever it comes from: how large it is, under which licence, by whom."""

from __future__ import annotations

from dataclasses import dataclass

from continual.config.globs import is_in, unwanted
from continual.config.values import Bytes, Texts
from continual.errors import Refuse
from continual.gates.contract import AtHeaders, Headers
from continual.gates.model_card import card_of
from continual.outside import shown
from continual.records import SCHEME
from continual.tensors import Adapter


@dataclass(frozen=True)
class PolicyGate(AtHeaders):
    """Refuses a model that is larger than `max_bytes`, has more than `max_tensors`, a licence that is not in `licences`
    or is in `deny_licences`, or an owner on the Hub that is not in `authors` or is in `deny_authors` (globs; empty:
    any).

    The licence is the one that the Hub says, or the card in a folder names; `none` where there is none, and of several
    each counts. Capital letters are read as small ones. A folder has no owner that anything says: `authors` is not
    asked of it, and signatures are for that.
    """

    name = "policy"
    reasons = ("too-large", "licence", "author", "card")

    max_bytes: Bytes | None = None
    max_tensors: int | None = None
    licences: Texts = ()
    deny_licences: Texts = ()
    authors: Texts = ()
    deny_authors: Texts = ()

    def judge(self, seen: Headers) -> None:
        """Raises Refuse: `too-large`, `licence`, `author`, `card` where that of a folder cannot be read; Retry."""
        self._check_size(seen)
        self._check_author(seen)
        if self.licences or self.deny_licences:
            self._check_licence(seen)

    def _check_size(self, seen: Headers) -> None:
        where, model = seen.model.place, seen.model
        if self.max_bytes is not None and model.nbytes > self.max_bytes:
            raise Refuse(
                "too-large",
                f"{where}: has {model.nbytes} bytes of tensors, more than gates.policy.max_bytes = {self.max_bytes}",
                by=("max_bytes",),
            )
        count = len((model.weights if isinstance(model, Adapter) else model).tensors)
        if self.max_tensors is not None and count > self.max_tensors:
            raise Refuse(
                "too-large",
                f"{where}: has {count} tensors, more than gates.policy.max_tensors = {self.max_tensors}",
                by=("max_tensors",),
            )

    def _check_author(self, seen: Headers) -> None:
        origin = seen.candidate.origin
        owner = origin.removeprefix(SCHEME).partition("/")[0] if origin.startswith(SCHEME) else None
        if owner is None:
            return
        if self.authors and not is_in(owner, self.authors):
            raise Refuse("author", f"{seen.model.place}: {owner} is not in gates.policy.authors", by=("authors",))
        if is_in(owner, self.deny_authors):
            raise Refuse("author", f"{seen.model.place}: {owner} is in gates.policy.deny_authors", by=("deny_authors",))

    def _check_licence(self, seen: Headers) -> None:
        try:
            licence = seen.candidate.licence or card_of(seen.model.place).licence
        except Refuse as refusal:
            if refusal.reason != "card":
                raise
            raise Refuse(
                "card",
                f"{refusal}; gates.policy.licences and gates.policy.deny_licences ask for the licence in it",
                by=("licences", "deny_licences"),
            ) from None
        if (other := unwanted(licence, self.licences, self.deny_licences)) is not None:
            word, setting = other
            lacking = "not " if setting == "licences" else ""
            raise Refuse(
                "licence",
                f"{seen.model.place}: its licence {shown(word)} is {lacking}in gates.policy.{setting}",
                by=(setting,),
            )
