"""A merge that is written down for mergekit (YAML), as settings and commands of continual that make the same merge.

Read is what the configuration of mergekit 0.1 says. What has no equal here is refused by its key, with what can be done
instead; nothing is left out in silence. `tests.campaigns.recipes` compares the formulas of both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from continual.config import plain_yaml
from continual.config.imported import Imported
from continual.errors import Misconfigured
from continual.outside import few

_KEYS = (
    *("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer"),
    *("slices", "modules", "chat_template"),
)
_LAYERS = (
    "continual keeps every layer of the base and folds whole models; where each slice is all of its model, write "
    "models: in its place"
)
_REPO = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*(?:@[A-Za-z0-9_][\w./-]*)?", re.ASCII)
_DTYPES = ("float32", "float16", "bfloat16")
_SPHERE = "goes along a sphere, which continual does not; for fine-tunes of one base linear is near to it: write "
_NONE = {
    "slerp": _SPHERE + "merge_method: linear, with the weights 1 - t and t",
    "nuslerp": _SPHERE + "merge_method: linear, with the same weights",
    "multislerp": _SPHERE + "merge_method: linear, with the same weights",
    "karcher": _SPHERE + "merge_method: linear, with equal weights",
    "passthrough": "puts layers of several models one behind the other; continual keeps the layers of the base: this "
    "is mergekit's work",
    "della": "drops by chance and by size; near to it is merge_method: dare_ties with normalize: true",
    "della_linear": "drops by chance and by size; near to it is merge_method: dare_linear",
    "model_stock": "finds its weights from angles; near to it is merge_method: linear with equal weights, or the "
    "default of continual: 'continual init BASE' and fold the models",
}
"""Methods that have no equal here, and what comes near."""
_INSTEAD = (
    "continual has no rule like it; 'continual rules' lists what there is, and the default, tsv-flow, needs no numbers"
)


class _Model(NamedTuple):
    """A model of the list: how it is named there, and its own parameters; `where` it stands, for messages."""

    named: str
    parameters: Mapping[str, object]
    where: str


class _Recipe:
    """A configuration that is being read; `file` is how it is called in messages."""

    def __init__(self, file: str, body: Mapping[str, object]) -> None:
        self._file = file
        self._body = body
        self.notes: list[str] = []
        self._shared = self._table(body.get("parameters") or {}, "parameters", "")

    def _wrong(self, key: str, why: str) -> Misconfigured:
        """What is said of a key."""
        return Misconfigured(f"{self._file}: {key}: {why}")

    def _table(self, value: object, key: str, what: str) -> Mapping[str, object]:
        """Raises Misconfigured for what is no table."""
        if isinstance(value, dict) and all(isinstance(one, str) for one in value):
            return value
        raise self._wrong(key, f"write a table{what}")

    def read(self, base: str | None) -> Imported:
        """The merge. `base` stands for a `base_model` that is not there."""
        method = self._method()
        self._only_known()
        models = list(self._models())
        named = self._body.get("base_model") or base
        if base is not None and named != base:
            raise self._wrong("base_model", f"is {named}, and --base says {base}: leave --base out")
        if not isinstance(named, str):
            raise self._wrong(
                "base_model", "is missing: mergekit's linear needs none, continual does; name it by --base"
            )
        others = [one for one in models if one.named != named]
        if method == "linear" and self._body.get("base_model") and len(others) == len(models):
            models.append(_Model(named, {}, "base_model, which linear counts as well"))
        if not others:
            raise self._wrong("models", "name at least one model besides the base")
        rule, scale, options, before = self._formula(method, models, others, named)
        weights = {self._name(one, named): self._number(one, "weight", None) for one in others}
        if len(weights) < len(others):
            raise self._wrong("models", f"two are called alike; {few(weights)}: give their folders names of their own")
        weighed = len(set(weights.values())) > 1 or (rule == "task-arithmetic" and set(weights.values()) != {1.0})
        kept = [one for one in others if weights[self._name(one, named)] != 0.0]
        return Imported(
            base=self._place("base_model", named).removeprefix("hf://" if "/" in named else ""),
            rule=rule,
            scale=scale,
            models=tuple(self._folded(one, named) for one in kept),
            options=options,
            before=before,
            weights={name: w for name, w in weights.items() if w not in (0.0, 1.0)} if weighed else {},
            tokenizer=self._tokenizer(named),
            dtype=self._dtype(),
            notes=tuple(self.notes),
        )

    def _method(self) -> str:
        method = self._body.get("merge_method")
        if not isinstance(method, str):
            raise self._wrong("merge_method", "is missing")
        if method in _FORMULAS:
            return method
        raise self._wrong("merge_method", f"{method} {_NONE[method]}" if method in _NONE else f"{method}: {_INSTEAD}")

    def _only_known(self) -> None:
        for key, value in self._body.items():
            if key not in _KEYS:
                raise self._wrong(key, f"is no key of mergekit's; known are {', '.join(_KEYS)}")
            if key in ("slices", "modules") and value:
                raise self._wrong(key, _LAYERS)
        if self._body.get("chat_template"):
            raise self._wrong("chat_template", "name the model that has it as tokenizer_source: it goes with that")

    def _models(self) -> Iterator[_Model]:
        listed = self._body.get("models")
        if not isinstance(listed, list) or not listed:
            raise self._wrong("models", "write a list of models")
        for number, one in enumerate(listed, 1):
            where = f"models, number {number}"
            body = self._table(one, where, " with model and parameters")
            if extra := body.keys() - {"model", "parameters"}:
                raise self._wrong(where, f"{', '.join(sorted(extra))} is no key of a model")
            name = body.get("model")
            if not isinstance(name, str) or not name.isprintable() or not name:
                raise self._wrong(where, "its model is no name")
            given = self._table(body.get("parameters") or {}, f"{where}, parameters", "")
            yield _Model(name, given, where)

    def _formula(
        self, method: str, models: Sequence[_Model], others: Sequence[_Model], base: str
    ) -> tuple[str, str, dict[str, object], tuple[str, ...]]:
        """Rule, scale, options and transforms."""
        form = _FORMULAS[method]
        for where, given in [("parameters", self._shared), *((f"{m.where}, parameters", m.parameters) for m in models)]:
            if unknown := sorted(given.keys() - form.keys):
                raise self._wrong(f"{where}.{unknown[0]}", f"{method} has no equal of it here")
        if method == "linear":
            return *self._linear(models, others, base), {}, ()
        scale = self._float("parameters.lambda", self._shared.get("lambda", 1.0))
        if scale <= 0.0:
            raise self._wrong("parameters.lambda", f"{scale:g}: the scale of a merge is above 0")
        normalize = self._switch("normalize", form.normalize)
        before, options = self._sparse(form, others)
        if not form.elects:
            return "mean" if normalize else "task-arithmetic", _short(scale), {}, before
        if not normalize:
            raise self._wrong(
                "parameters.normalize",
                f"{method} without it adds what agrees in sign, and continual takes the mean of it: write normalize: "
                "true if that is meant",
            )
        weights = {self._number(one, "weight", None) for one in others}
        if len(weights) > 1 or min(weights) <= 0.0:
            raise self._wrong("weight", f"{method} counts every model alike here: give all the same weight, above 0")
        return "ties", _short(scale), options, before

    def _linear(self, models: Sequence[_Model], others: Sequence[_Model], base: str) -> tuple[str, str]:
        """A weighted mean of models is the base and the weighted mean of what they changed."""
        every = sum(self._number(one, "weight", None) for one in models)
        mine = sum(self._number(one, "weight", None) for one in others)
        if mine <= 0.0:
            raise self._wrong("weight", "all of them are 0")
        if self._switch("normalize", True):
            return "mean", _short(mine / every)
        if abs(every - 1.0) > 1e-6:
            raise self._wrong(
                "parameters.normalize",
                f"without it the weights, which sum to {every:g}, also multiply the base {base}: make them sum to 1",
            )
        return "task-arithmetic", "1"

    def _sparse(self, form: _Formula, others: Sequence[_Model]) -> tuple[tuple[str, ...], dict[str, object]]:
        """The transforms before the sum, and the options of ties."""
        if form.sparse is None:
            return (), {}
        rescale = self._switch("rescale", form.sparse == "drop")
        density = self._alike(others, "density", 1.0)
        if not 0.0 < density <= 1.0:
            raise self._wrong("density", f"{density:g}: has to be above 0 and at most 1")
        if form.sparse == "trim":
            if rescale:
                raise self._wrong(
                    "parameters.rescale", "ties here keeps what is left as long as it is: write rescale: false"
                )
            return (), {"density": density, "trim": "tensor"}
        options: dict[str, object] = {"density": 1.0} if form.elects else {}
        if density == 1.0 and form.sparse == "drop":
            return (), options
        if form.sparse == "drop":
            self.notes.append(
                "what dare drops is drawn by chance: the same share of other numbers than mergekit's, and what is left "
                "is multiplied by 1/density"
            )
            kept = "" if rescale else ":rescale=false"
            return (f"drop:rate={_short(1.0 - density)}{kept}",), options
        if rescale:
            raise self._wrong(
                "parameters.rescale", "breadcrumbs here keep what is left as long as it is: write rescale: false"
            )
        top = self._alike(others, "gamma", 0.01)
        if not 0.0 <= top < 1.0 or 1.0 - density - top < -1e-9:
            raise self._wrong(
                "gamma", f"{top:g}: with density = {density:g} it has to leave something: their sum is at most 1"
            )
        self.notes.append("how many numbers are cut at either end is rounded otherwise: one number a tensor at most")
        return (f"breadcrumbs:top={_short(top)}:bottom={_short(max(0.0, 1.0 - density - top))}",), options

    def _alike(self, others: Sequence[_Model], key: str, default: float) -> float:
        """A number that is the same of all models."""
        found = {self._number(one, key, default) for one in others}
        if len(found) > 1:
            raise self._wrong(key, f"{few(_short(one) for one in sorted(found))}: a state has one for all models")
        return found.pop()

    def _number(self, model: _Model, key: str, default: float | None) -> float:
        """A parameter of a model, else the one for all. Of the weight: not below 0."""
        given = model.parameters.get(key, self._shared.get(key, default))
        where = f"{model.where}, parameters.{key}"
        if given is None:
            raise self._wrong(where, "is missing")
        found = self._float(where, given)
        if key == "weight" and found < 0.0:
            raise self._wrong(where, f"{found:g}: a model is not taken away by a weight below 0 here; leave it out")
        return found

    def _float(self, where: str, given: object) -> float:
        if isinstance(given, list):
            raise self._wrong(
                where,
                "a list goes by layer or by tensor, and a model has one number here; 'continual tune --what "
                "models-layers' finds one for each layer",
            )
        try:
            found = float(given) if isinstance(given, int | float | str) and not isinstance(given, bool) else None
        except ValueError:
            found = None
        if found is None or not abs(found) < 1e30:
            raise self._wrong(where, f"{given!r} is no number"[:200])
        return found

    def _switch(self, key: str, default: bool) -> bool:
        given = self._shared.get(key, default)
        if not isinstance(given, bool):
            raise self._wrong(f"parameters.{key}", f"{given!r} is neither true nor false"[:200])
        return given

    def _folded(self, model: _Model, base: str) -> str:
        """The model as `fold` takes it; of one that is a base with an adapter (`BASE+ADAPTER`) the adapter."""
        under, plus, adapter = model.named.partition("+")
        if plus and under != base:
            raise self._wrong(
                model.where, f"{model.named}: an adapter on another model than base_model: merge the two first"
            )
        return self._place(model.where, adapter if plus else model.named)

    def _place(self, where: str, named: str) -> str:
        """A model as `fold` takes it: a path that is there or is written as one, else a repo of the Hub."""
        if named.startswith(("/", "./", "../", "~")) or Path(named).is_dir():
            return str(Path(named).expanduser())
        if not _REPO.fullmatch(named.removeprefix("hf://")):
            raise self._wrong(where, f"{named!r} is no directory here, and no repo of the Hub"[:300])
        return f"hf://{named.removeprefix('hf://')}"

    def _name(self, model: _Model, base: str) -> str:
        """What the model is called in a state: its repo, or the last part of its path."""
        place = self._folded(model, base)
        return place.removeprefix("hf://").partition("@")[0] if place.startswith("hf://") else Path(place).name

    def _tokenizer(self, base: str) -> str:
        given, key = self._body.get("tokenizer_source"), "tokenizer_source"
        if (table := self._body.get("tokenizer")) is not None:
            body = self._table(table, "tokenizer", " with source")
            if extra := sorted(body.keys() - {"source"}):
                raise self._wrong(f"tokenizer.{extra[0]}", "tokens are taken from one tokenizer as they are")
            given, key = body.get("source"), "tokenizer.source"
        if given is None or given in ("base", base):
            return "base"
        if given == "union" or not isinstance(given, str):
            raise self._wrong(
                key,
                f"{given}: a state has the rows of its base; name a model, and let vocab = by-token match rows of "
                "others by their tokens",
            )
        return self._name(_Model(given, {}, key), base)

    def _dtype(self) -> str | None:
        given = self._body.get("out_dtype") or self._body.get("dtype")
        if given is not None and given not in _DTYPES:
            raise self._wrong("dtype", f"{given}: name one of {', '.join(_DTYPES)}")
        return None if given is None else str(given)


class _Formula(NamedTuple):
    """A method that has an equal: the parameters that are read, whether it divides by the weights by default, whether
    it elects signs (as TIES), and what it leaves out first."""

    keys: frozenset[str]
    normalize: bool
    elects: bool = False
    sparse: str | None = None


_SUM = frozenset({"weight", "lambda", "normalize", "int8_mask"})
_THIN = _SUM | {"density", "rescale"}
_FORMULAS = {
    "linear": _Formula(frozenset({"weight", "normalize"}), True),
    "task_arithmetic": _Formula(_SUM, False),
    "ties": _Formula(_THIN, True, True, "trim"),
    "dare_linear": _Formula(_THIN, False, False, "drop"),
    "dare_ties": _Formula(_THIN, False, True, "drop"),
    "breadcrumbs": _Formula(_THIN | {"gamma"}, False, False, "breadcrumbs"),
    "breadcrumbs_ties": _Formula(_THIN | {"gamma"}, False, True, "breadcrumbs"),
}


def read(file: Path, base: str | None = None) -> Imported:
    """The merge that a file of mergekit describes; `base`: the base where it names none. Raises Misconfigured naming
    the key that has no equal here, and for a file that cannot be read."""
    return _Recipe(str(file), plain_yaml.read(file)).read(base)


def _short(value: float) -> str:
    return f"{value:.12g}"
