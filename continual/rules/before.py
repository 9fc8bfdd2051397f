"""What can be done to a task vector before it is folded: `trim`, `drop`, `breadcrumbs`; and `chain`, which puts them
before a rule.

Trim is the first step of TIES (Yadav et al. 2023). Drop is DARE (Yu et al. 2024, "Language Models are Super Mario",
equation 2): each change is dropped with probability `rate` and the rest divided by 1 − rate. Breadcrumbs (Davari and
Belilovsky 2024, "Model Breadcrumbs", section 3): of each tensor the largest and the smallest changes are left out. A
number that is not finite is never dropped: it has to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from continual.errors import Misconfigured
from continual.records import TensorSpec
from continual.rules import trimming
from continual.rules.contract import Accumulators, Folded, Inputs, Measure, Measured, Option, Rule, Totals, resolve

_WORDS_OF_A_BLOCK = 8
"""32-bit words of one counter of Philox."""


class Transform(NamedTuple):
    """One step on τ before the fold.

    apply(τ, inputs): the task vector to fold, may overwrite τ. elementwise: τ may be any run of a tensor, from element
    `inputs.start` on; else it is whole.
    seeded: needs `inputs.seed`. measure: what it has to know of the whole model.
    """

    apply: Callable[[Tensor, Inputs], Tensor]
    elementwise: bool = True
    seeded: bool = False
    measure: Measure | None = None


class Step(NamedTuple):
    """A row of TRANSFORMS: `make` gets all options, checked."""

    name: str
    summary: str
    paper: str
    options: Mapping[str, Option]
    make: Callable[[Mapping[str, Any]], Transform]


def _trim(options: Mapping[str, Any]) -> Transform:
    density: float = options["density"]
    if options["over"] == "tensor":
        return Transform(lambda tau, _: trimming.trimmed(tau, trimming.own_threshold(tau, density)), elementwise=False)
    return Transform(
        lambda tau, inputs: trimming.trimmed(tau, inputs.measured["threshold"]), measure=trimming.counted(density)
    )


def _drop(options: Mapping[str, Any]) -> Transform:
    rate, scale, own = options["rate"], 1.0 / (1.0 - options["rate"]) if options["rescale"] else 1.0, options["seed"]

    def apply(tau: Tensor, inputs: Inputs) -> Tensor:
        words = random_words(f"{inputs.seed} {own}", inputs.start, tau.numel())
        kept = torch.from_numpy((words >= np.uint32(min(int(rate * 2**32), 2**32 - 1))).astype(np.float32))
        # a product, so that what is not finite stays so
        return tau.mul_(kept.mul_(scale).to(tau.device).view(tau.shape))

    return Transform(apply, seeded=True)


def random_words(seed: str, start: int, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Words `start` … `start + count` of the stream of 32-bit words that `seed` names: Philox 4×64 keyed with its
    BLAKE3 hash, the same on every machine."""
    stream = np.random.Philox(key=int.from_bytes(blake3(seed.encode()).digest(length=16), "little"))
    first = start // _WORDS_OF_A_BLOCK
    stream.advance(first)
    ahead = start - first * _WORDS_OF_A_BLOCK
    raw: np.ndarray[Any, np.dtype[np.uint64]] = stream.random_raw((ahead + count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[ahead : ahead + count]


def _breadcrumbs(options: Mapping[str, Any]) -> Transform:
    top, bottom = options["top"], options["bottom"]
    if top + bottom >= 1.0:
        raise Misconfigured(
            f"breadcrumbs: top = {top:g} and bottom = {bottom:g} leave nothing; together they have to be below 1"
        )

    def apply(tau: Tensor, _: Inputs) -> Tensor:
        if not tau.numel():
            return tau
        size = tau.abs().flatten()
        least = size.kthvalue(int(bottom * len(size)) + 1).values
        most = size.kthvalue(len(size) - int(top * len(size))).values
        return tau.mul_(((size >= least) & (size <= most)).float().view(tau.shape))

    return Transform(apply, elementwise=False)


def _part(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError("a number at least 0 and below 1")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


TRANSFORMS: Mapping[str, Step] = {
    step.name: step
    for step in (
        Step(
            "trim",
            "keep the changes of largest magnitude",
            "Yadav et al. 2023, TIES-Merging, step 1",
            {
                "density": Option(0.2, "share of the changes that is kept, in (0, 1]", trimming.share),
                "over": Option("model", f"over what the share is taken: {', '.join(trimming.SCOPES)}", trimming.scope),
            },
            _trim,
        ),
        Step(
            "drop",
            "drop changes at random and rescale the rest",
            "Yu et al. 2024, Language Models are Super Mario (DARE)",
            {
                "rate": Option(0.9, "probability of a change to be dropped, in [0, 1)", _part),
                "rescale": Option(True, "divide what is left by 1 - rate", _flag),
                "seed": Option(
                    0, "another number drops others; the rest of the seed is the tensor's content and name", _whole
                ),
            },
            _drop,
        ),
        Step(
            "breadcrumbs",
            "leave out the largest and the smallest changes of each tensor",
            "Davari and Belilovsky 2024, Model Breadcrumbs",
            {
                "top": Option(0.007, "share of the largest that is left out", _part),
                "bottom": Option(0.85, "share of the smallest that is left out", _part),
            },
            _breadcrumbs,
        ),
    )
}
"""Every transform by name."""


def parse(given: Any) -> list[dict[str, Any]]:
    """A list of transforms in its canonical form: each a mapping with `name` and all its options.

    Items may be mappings with some of the options, or texts as `drop:rate=0.9:seed=1`. Raises Misconfigured for
    anything else, or unknown names.
    """
    if not isinstance(given, list | tuple):
        raise Misconfigured(f"before = {given!r}: it has to be a list of transforms, as ['drop:rate=0.9']")
    return [_canonical(item) for item in given]


def _canonical(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        name, *pairs = item.split(":")
        if bad := next((pair for pair in pairs if "=" not in pair), None):
            raise Misconfigured(f"before: {item!r}: {bad!r} is no option; write it as {name}:key=value")
        item = {"name": name} | {
            key.strip(): _value(value) for key, _, value in (pair.partition("=") for pair in pairs)
        }
    if not isinstance(item, Mapping) or item.get("name") not in TRANSFORMS:
        unknown = item.get("name") if isinstance(item, Mapping) else item
        raise Misconfigured(f"before: unknown transform {unknown!r}; the transforms are: {', '.join(TRANSFORMS)}")
    given = {key: value for key, value in item.items() if key != "name"}
    return {"name": item["name"], **resolve(f"transform {item['name']}", TRANSFORMS[item["name"]].options, given)}


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return words.get(text.strip(), text.strip())


def chain(rule: Rule, items: Sequence[Mapping[str, Any]]) -> Rule:
    """`rule` with the transforms `items` (as `parse` gives them) done to each task vector first, in their order; its
    options say so.

    Raises Misconfigured where one has to count over the whole model after one that needs whole tensors.
    """
    steps = [TRANSFORMS[item["name"]].make({k: v for k, v in item.items() if k != "name"}) for item in items]
    measures = [
        (place, m) for place, m in enumerate([*(step.measure for step in steps), rule.measure]) if m is not None
    ]
    names = [*(item["name"] for item in items), f"rule {rule.name}"]
    for place, _ in measures:
        if late := next((names[i] for i, step in enumerate(steps[:place]) if not step.elementwise), None):
            raise Misconfigured(
                f"before: {names[place]} counts over the whole model and {late} needs whole tensors: put {names[place]} first, or let it count per tensor"
            )
    whole_only = not all(step.elementwise for step in steps)

    def inputs_of(place: int, inputs: Inputs) -> Inputs:
        return inputs._replace(measured=lead_of(place, inputs.measured), seed=inputs.seed + place)

    def transformed(tau: Tensor, inputs: Inputs, upto: int) -> Tensor:
        for place, step in enumerate(steps[:upto]):
            tau = step.apply(tau, inputs_of(place, inputs))
        return tau

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        return rule.fold(accumulators, transformed(tau, inputs, len(steps)), inputs_of(len(steps), inputs), totals)

    def passes(number: int) -> tuple[int, int, Measure]:
        for place, measure in measures:
            if number < measure.passes:
                return place, number, measure
            number -= measure.passes
        raise IndexError(number)

    def lead_of(place: int, measured: Measured) -> dict[str, float]:
        lead = f"{place}."
        return {key[len(lead) :]: value for key, value in measured.items() if key.startswith(lead)}

    def share(number: int, measured: Measured) -> float:
        place, own, measure = passes(number)
        return measure.share(own, lead_of(place, measured))

    def tally(number: int, tau: Tensor, inputs: Inputs) -> Tensor:
        place, own, measure = passes(number)
        return measure.tally(own, transformed(tau, inputs, place), inputs_of(place, inputs))

    def conclude(number: int, counts: Tensor, numel: int, measured: Measured) -> dict[str, float]:
        place, own, measure = passes(number)
        return {
            **measured,
            **{
                f"{place}.{key}": value
                for key, value in measure.conclude(own, counts, numel, lead_of(place, measured)).items()
            },
        }

    def workspace(spec: TensorSpec) -> int:
        return rule.workspace(spec) + (24 if whole_only else 0) * spec.numel

    return rule._replace(
        options={**rule.options, "before": [dict(item) for item in items]},
        elementwise=lambda spec: not whole_only and rule.elementwise(spec),
        fold=fold,
        workspace=workspace,
        seeded=rule.seeded or any(step.seeded for step in steps),
        measure=Measure(sum(m.passes for _, m in measures), share, tally, conclude) if measures else None,
    )
