"""What can be done to a task vector before it is folded: the transforms `trim`, `drop` and `breadcrumbs`. How they are
put before a rule is in `chain`.

Trim is the first step of TIES (Yadav et al. 2023). Drop is DARE (Yu et al. 2024, "Language Models are Super Mario",
equation 2): each change is dropped with probability `rate` and the rest divided by 1 − rate. Breadcrumbs (Davari and
Belilovsky 2024, "Model Breadcrumbs", section 3): of each tensor the largest and the smallest changes are left out. A
number that is not finite is never dropped: it has to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple

from blake3 import blake3

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.lazily import numpy as np
from continual.rules import trimming
from continual.rules.contract import Inputs, Pass
from continual.rules.options import Choice, Flag, Number, O, Option, Whole, declared, plain, resolve

if TYPE_CHECKING:
    import numpy.typing as npt

_WORDS_OF_A_BLOCK = 8
"""32-bit words of one counter of Philox."""
PART = Number(least=0.0, below=1.0)


class Transform(NamedTuple):
    """One step on τ before the fold.

    apply(τ, inputs): the task vector to fold, may overwrite τ. elementwise: τ may be any run of a tensor, from element
    `inputs.start` on; else it is whole. seeded: it needs `inputs.seed`. measure: the first pass over the model, where
    it has to know something of the whole of it. said: its name and all its options, by which another process has the
    same.
    """

    apply: Callable[[Tensor, Inputs], Tensor]
    elementwise: bool = True
    seeded: bool = False
    measure: Pass | None = None
    said: Mapping[str, object] = MappingProxyType({})

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (dict(self.said),)


@dataclass(frozen=True, kw_only=True)
class TransformRow(Generic[O]):
    """A transform in the list of transforms. options: the dataclass that declares its options. make: the transform,
    from its options."""

    name: str
    summary: str
    paper: str
    options: type[O]
    make: Callable[[O], Transform]

    @property
    def declared(self) -> dict[str, Option]:
        """Its options by name."""
        return declared(self.options)

    def canonical(self, given: Mapping[str, object]) -> dict[str, object]:
        """The transform as the state keeps it: its name and all its options. Raises Misconfigured for an unknown
        option, or a value that is not allowed."""
        return {"name": self.name, **plain(self._resolved(given))}

    def transform(self, given: Mapping[str, object]) -> Transform:
        """The transform with these options. Raises Misconfigured as `canonical` does, and where they do not fit each
        other."""
        return self.make(self._resolved(given))._replace(said=self.canonical(given))

    def _resolved(self, given: Mapping[str, object]) -> O:
        return resolve(f"transform {self.name}", self.options, {k: v for k, v in given.items() if k != "name"})


@dataclass(frozen=True)
class TrimOptions:
    """The options of `trim`."""

    density: Annotated[float, Number(above=0.0, most=1.0), "share of the changes that is kept"] = 0.2
    over: Annotated[str, Choice(trimming.SCOPES), "over what the share is taken"] = "model"


def _trim(options: TrimOptions) -> Transform:
    def own(tau: Tensor, inputs: Inputs) -> Tensor:
        return trimming.trimmed(tau, trimming.own_threshold(tau, options.density))

    def of_model(tau: Tensor, inputs: Inputs) -> Tensor:
        return trimming.trimmed(tau, trimming.found_threshold(inputs))

    if options.over == "tensor":
        return Transform(own, elementwise=False)
    return Transform(of_model, measure=trimming.Sampled(options.density))


@dataclass(frozen=True)
class DropOptions:
    """The options of `drop`."""

    rate: Annotated[float, PART, "probability of a change to be dropped"] = 0.9
    rescale: Annotated[bool, Flag(), "divide what is left by 1 - rate"] = True
    seed: Annotated[
        int, Whole(), "another number drops others; the rest of the seed is the tensor's content and name"
    ] = 0


def _drop(options: DropOptions) -> Transform:
    scale = 1.0 / (1.0 - options.rate) if options.rescale else 1.0
    least = np.uint32(min(int(options.rate * 2**32), 2**32 - 1))

    def apply(tau: Tensor, inputs: Inputs) -> Tensor:
        words = random_words(f"{inputs.seed} {options.seed}", inputs.start, tau.numel())
        kept = torch.from_numpy((words >= least).astype(np.float32))
        # a product, so that what is not finite stays so
        return tau.mul_(kept.mul_(scale).to(tau.device).view(tau.shape))

    return Transform(apply, seeded=True)


def random_words(seed: str, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Words `start` … `start + count` of the stream of 32-bit words that `seed` names: Philox 4×64 keyed with its
    BLAKE3 hash, the same on every machine."""
    stream = np.random.Philox(key=int.from_bytes(blake3(seed.encode()).digest(length=16), "little"))
    first = start // _WORDS_OF_A_BLOCK
    stream.advance(first)
    ahead = start - first * _WORDS_OF_A_BLOCK
    raw: npt.NDArray[np.uint64] = stream.random_raw((ahead + count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[ahead : ahead + count]


@dataclass(frozen=True)
class BreadcrumbsOptions:
    """The options of `breadcrumbs`."""

    top: Annotated[float, PART, "share of the largest that is left out"] = 0.007
    bottom: Annotated[float, PART, "share of the smallest that is left out"] = 0.85


def _breadcrumbs(options: BreadcrumbsOptions) -> Transform:
    top, bottom = options.top, options.bottom
    if top + bottom >= 1.0:
        raise Misconfigured(
            f"breadcrumbs: top = {top:g} and bottom = {bottom:g} leave nothing; together they have to be below 1"
        )

    def apply(tau: Tensor, inputs: Inputs) -> Tensor:
        if not tau.numel():
            return tau
        size = tau.abs().flatten()
        least = size.kthvalue(int(bottom * len(size)) + 1).values
        most = size.kthvalue(len(size) - int(top * len(size))).values
        return tau.mul_(((size >= least) & (size <= most)).float().view(tau.shape))

    return Transform(apply, elementwise=False)


_ROWS: tuple[TransformRow[Any], ...] = (
    TransformRow(
        name="trim",
        summary="keep the changes of largest magnitude",
        paper="Yadav et al. 2023, TIES-Merging, step 1",
        options=TrimOptions,
        make=_trim,
    ),
    TransformRow(
        name="drop",
        summary="drop changes at random and rescale the rest",
        paper="Yu et al. 2024, Language Models are Super Mario (DARE)",
        options=DropOptions,
        make=_drop,
    ),
    TransformRow(
        name="breadcrumbs",
        summary="leave out the largest and the smallest changes of each tensor",
        paper="Davari and Belilovsky 2024, Model Breadcrumbs",
        options=BreadcrumbsOptions,
        make=_breadcrumbs,
    ),
)
TRANSFORMS: Mapping[str, TransformRow[Any]] = {row.name: row for row in _ROWS}
"""Every transform by name."""


def _again(said: Mapping[str, object]) -> Transform:
    return TRANSFORMS[str(said["name"])].transform(said)


def parse(given: object) -> list[dict[str, object]]:
    """A list of transforms in its canonical form: each a mapping with `name` and all its options.

    Items may be mappings with some of the options, or texts as `drop:rate=0.9:seed=1`. Raises Misconfigured for
    anything else, or unknown names.
    """
    if not isinstance(given, list | tuple):
        raise Misconfigured(f"before = {given!r}: it has to be a list of transforms, as ['drop:rate=0.9']")
    return [_canonical(_of_text(item) if isinstance(item, str) else item) for item in given]


def _canonical(item: object) -> dict[str, object]:
    name = item.get("name") if isinstance(item, Mapping) else item
    if not isinstance(item, Mapping) or not isinstance(name, str) or name not in TRANSFORMS:
        raise Misconfigured(f"before: unknown transform {name!r}; the transforms are: {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name].canonical(item)


def _of_text(text: str) -> dict[str, object]:
    """`drop:rate=0.9:seed=1` as a mapping."""
    name, *pairs = text.split(":")
    if bad := next((pair for pair in pairs if "=" not in pair), None):
        raise Misconfigured(f"before: {text!r}: {bad!r} is no option; write it as {name}:key=value")
    options = (pair.partition("=") for pair in pairs)
    return {"name": name, **{key.strip(): _value(value) for key, _, value in options}}


def _value(text: str) -> object:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.strip(), text.strip())
