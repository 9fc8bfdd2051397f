"""Which models of a state of adapters are read, by which rule and with which weights: a view. It folds nothing."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from continual.blocks.merged import check
from continual.config import Settings
from continual.engine.models_inputs import of_folds
from continual.errors import Misconfigured
from continual.outside import counted, few
from continual.records import depths_of
from continual.rules import ReadAs, ReadOptions, Rule, read_as, reader
from continual.state import State
from continual.state.format import FoldCommit
from continual.state.ledger import weights_at

_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class ReadView:
    """How a state is read, where that is not as the state says.

    `rule`: what is made of the adapters, with its `options`, or of the merge; `scale` and `lines`: how long the result
    is, by default as that rule has it. `only`: names, paths, keys, record numbers or globs of the models that are read,
    `without` of those that are not. `weights`: the weight of a model, by the same words; those that are not named have
    the weight that they were folded with. Of a merge of whole tensors no models can be chosen.
    `name`: what the settings call it; then a glob may match no model, since one may come later.
    """

    rule: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    scale: str | None = None
    lines: str | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    name: str = ""

    def changed(self, by: ReadView) -> ReadView:
        """The same view with what `by` says in place of what this says; it has no name any more, if `by` says
        anything. Another rule begins with no options."""
        said = {name: getattr(by, name) for name in by.described()}
        if "rule" in said:
            said.setdefault("options", {})
        return replace(self, name="", **said) if said else self

    def by(self, name: str | None) -> ReadView:
        """The same view, read by the rule `name` where it names none."""
        return self if self.rule or name is None else replace(self, rule=name)

    def read_by(self, made: Rule, now: ReadOptions, state: State) -> tuple[Rule, ReadOptions]:
        """The rule that reads `state` and the read-time options: `made` and `now`, those of the state, unless this says
        otherwise. Raises Misconfigured for a rule, an option or a scale that is not known, or cannot read it."""
        wanted = ReadAs(self.rule, self.scale, self.lines, self.options)
        return read_as(made, now, wanted, blocks=state.format.form is not None)

    def chosen(self, state: State, seq: int, read: Mapping[str, float] | None = None) -> dict[int, float]:
        """The numbers of the adapters that are read at record `seq`, with their weights, in the order in which they
        were folded. `read`: weights by key that are in force where this says none. A model that a round weighed by
        layer has the mean of these weights. Raises Misconfigured for a word that names no model of the merge, and where
        none is left."""
        folds = state.ledger.folds(at=seq)
        kept = self.kept(folds)
        weights = {key: sum(each) / len(each) for key, each in (weights_at(state.ledger, seq) or {}).items()}
        weights |= self._given(folds, read or {})
        if folds and not kept:
            raise Misconfigured("no model is left to be read: 'only' and 'without' leave none")
        for word in self.weights:
            if (named := self._named(folds, (word,), "weight")) and not named & kept:
                raise Misconfigured(
                    f"weight = {word}: 'only' and 'without' leave that model out, so its weight would say nothing: "
                    "take the weight out, or have the model read"
                )
        found: dict[int, float] = {}
        for fold in folds:
            key, numbers = fold.entry.candidate.key, fold.entry.numbers
            if key in kept:
                assert numbers.block is not None, "a fold of a state of adapters"
                found[numbers.block] = weights.get(key, 1.0 if numbers.weight is None else numbers.weight)
        return found

    def layered(self, state: State, seq: int, read: Mapping[str, float]) -> dict[int, dict[float, float]]:
        """The weights that a round found for each layer, by the depth of the layer, of models by their numbers: of
        those that have such, and no other weight by `read` or by what this says."""
        folds = state.ledger.folds(at=seq)
        depths, given = depths_of(state.format.tensors), self._given(folds, read)
        found = {key: each for key, each in (weights_at(state.ledger, seq) or {}).items() if len(each) > 1}
        return {
            fold.entry.numbers.block or 0: dict(zip(depths, found[key], strict=True))
            for fold in folds
            if (key := fold.entry.candidate.key) in found and key not in given
        }

    def _given(self, folds: Sequence[FoldCommit], read: Mapping[str, float]) -> dict[str, float]:
        """By key, the weights that were given by hand, or tuned."""
        given = dict(read)
        for word, weight in self.weights.items():
            given |= dict.fromkeys(self._named(folds, (word,), "weight"), weight)
        return given

    def kept(self, folds: Sequence[FoldCommit]) -> set[str]:
        """The keys of those models of `folds` that are read; there may be none. Raises Misconfigured for a word that
        names no model."""
        kept = self._named(folds, self.only, "only") if self.only else {fold.entry.candidate.key for fold in folds}
        return kept - self._named(folds, self.without, "without")

    def described(self) -> dict[str, object]:
        """What it says, as plain data; nothing where it says nothing."""
        said = {
            "rule": self.rule,
            "options": dict(self.options),
            "scale": self.scale,
            "lines": self.lines,
            "only": list(self.only),
            "without": list(self.without),
            "weights": dict(self.weights),
            "name": self.name,
        }
        return {key: value for key, value in said.items() if value}

    def check(self, state: State) -> None:
        """Raises Misconfigured where a state keeps a merge of whole tensors and this chooses among its models."""
        if state.format.form is None and (self.only or self.without or self.weights):
            raise Misconfigured(
                f"{state.path} keeps a merge of whole tensors, of which no models can be chosen: only a state made "
                "with 'continual init --adapters' is read so"
            )

    def check_readable(self, made: Rule, now: ReadOptions, state: State) -> None:
        """Raises Misconfigured for what no fold can mend: of a rule, options, a scale or a weight that `state`, made by
        `made` and read by `now`, cannot be read by."""
        self.check(state)
        found, _ = self.read_by(made, now, state)
        if state.format.form is not None:
            check(found, dict(enumerate(self.weights.values())))

    def _named(self, folds: Sequence[FoldCommit], words: Sequence[str], what: str) -> set[str]:
        """The keys of the models that `words` name. Raises Misconfigured for one that names none."""
        found: set[str] = set()
        for word in words:
            mine = {
                fold.entry.candidate.key
                for fold in folds
                if word == str(fold.seq)
                or fold.entry.candidate.answers(word)
                or fnmatch.fnmatchcase(fold.entry.candidate.name, word)
            }
            numbered = next((fold.entry.candidate for fold in folds if word == str(fold.seq)), None)
            if numbered is not None and len(mine) > 1:
                raise Misconfigured(
                    f"{what} = {word}: record {word} is of {numbered.name}, and another model is called so: name the "
                    "one that is meant by its path or key"
                )
            if not mine and not (self.name and _GLOB.search(word)):
                there = few(fold.entry.candidate.name for fold in folds) or "nothing"
                raise Misconfigured(f"{what} = {word}: no model of the merge is called so; in it are {there}")
            found |= mine
        return found


def check_weights(rule: Rule, weights: Mapping[str, float]) -> None:
    """Raises Misconfigured where a state of adapters is to be read by `rule` and that does not take the weight of one
    of these models, by their names: whoever exports, and the daemon, would find that nothing can be read."""
    if rule.laws.weighted or rule.laws.rounds:
        return
    if heavy := {name: weight for name, weight in weights.items() if weight != 1.0}:
        name, weight = next(iter(heavy.items()))
        others = f", and {counted(len(heavy) - 1, 'other model')}" if len(heavy) > 1 else ""
        raise Misconfigured(
            f"{rule.name} reads every model with weight 1, and {name} has the weight {weight:g}{others}: have another "
            "rule read the merge ('continual scale --rule'; 'continual rules' says which take weights), or read it so "
            "in a view that gives each model the weight 1"
        )


def check_read_at(state: State, made: Rule, read: ReadOptions, seq: int) -> None:
    """`check_weights` of all models in the merge at record `seq`, as they would be read there, and whether their inputs
    are known. Raises Misconfigured."""
    if state.format.form is None:
        return
    by = reader(made, read.rule, blocks=True)
    if by.needs.inputs:
        of_folds(state, by, state.ledger.folds(at=seq))
    names = {fold.entry.numbers.block: fold.entry.candidate.name for fold in state.ledger.folds(at=seq)}
    chosen = ReadView().chosen(state, seq, dict(read.weights))
    check_weights(by, {names[number]: weight for number, weight in chosen.items()})


def view_of(settings: Settings, name: str) -> ReadView:
    """The view that the settings call `name`. Raises Misconfigured where they name no such view."""
    if name not in settings.views:
        there = ", ".join(settings.views) or "none"
        raise Misconfigured(f"view {name}: the settings name no such view; there are {there}")
    said = settings.views[name]
    return ReadView(said.rule, said.options, said.scale, said.lines, said.only, said.without, said.weights, name)
