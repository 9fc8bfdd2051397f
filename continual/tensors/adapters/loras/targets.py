"""Which weight of a base a module's name in a LoRA file means.

The names of a file have dots, or underscores in their place (`lora_unet_mid_block_attentions_0_proj_in`); the second
kind is looked up among the base's own modules, written so. A name that fits two modules is refused, and so are two
names for one module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from continual.errors import Refuse
from continual.records import TensorSpec
from continual.tensors.adapters.loras.releases import original
from continual.tensors.names.kinds import BaseModel

DENOISERS = ("transformer", "unet", "prior", "decoder")
"""Components that make an image out of noise."""
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_ENCODER_TYPES = ("clip_text_model", "t5", "clip")
_UNDERSCORED = re.compile(r"(?P<head>lora_unet|lora_te[123]?|lora_transformer|lora_prior|lycoris)_(?P<rest>[^.]+)")
_HEADS: Mapping[str, tuple[str, ...]] = {
    "lora_unet": DENOISERS,
    "lora_transformer": DENOISERS,
    "lora_prior": DENOISERS,
    "lycoris": DENOISERS,
    "lora_te": ENCODERS[:1],
    "lora_te1": ENCODERS[:1],
    "lora_te2": ENCODERS[1:2],
    "lora_te3": (ENCODERS[2], ENCODERS[1]),
}
"""The components that the beginning of a name can mean, the likeliest first. Trainers call T5 the third text encoder,
and in Flux it is the second."""
_DOTTED: Mapping[str, tuple[str, ...]] = {
    "diffusion_model": DENOISERS,
    "model.diffusion_model": DENOISERS,
    "text_encoders.clip_l.transformer": ENCODERS[:1],
    "text_encoders.clip_g.transformer": ENCODERS[1:2],
    "text_encoders.t5xxl.transformer": (ENCODERS[2], ENCODERS[1]),
    **{name: (name,) for name in (*DENOISERS, "transformer_2", "controlnet", *ENCODERS)},
}


class Meant(NamedTuple):
    """The modules of the base that a name means, in the order of its rows; `swapped`: its halves lie the other way
    round."""

    modules: tuple[str, ...]
    swapped: bool = False


class Name(NamedTuple):
    """A module's name in a file, taken apart: the components that it can be in, and what follows. `underscored`: with
    underscores in place of dots. `bare`: nothing says which component."""

    components: tuple[str, ...]
    rest: str
    underscored: bool = False
    bare: bool = False


def name_of(module: str) -> Name:
    """The parts of a module's name in a file."""
    if match := _UNDERSCORED.fullmatch(module):
        return Name(_HEADS[match["head"]], match["rest"], underscored=True)
    module = module.removeprefix("base_model.model.")
    for head in sorted(_DOTTED, key=len, reverse=True):
        if module.startswith(f"{head}."):
            return Name(_DOTTED[head], module[len(head) + 1 :])
    return Name(DENOISERS, module, bare=True)


class _Component:
    """A component of a base: its modules under every name that they have in files."""

    def __init__(self, prefix: str, modules: frozenset[str], *, denoiser: bool) -> None:
        self.dotted: dict[str, Meant] = {name: Meant((prefix + name,)) for name in modules}
        names = dict(_others(modules, denoiser=denoiser))
        for theirs, target in names.items():
            self.dotted.setdefault(theirs, Meant(tuple(prefix + name for name in target.modules), target.swapped))
        self.underscored: dict[str, set[Meant]] = {}
        for theirs, target in self.dotted.items():
            self.underscored.setdefault(theirs.replace(".", "_"), set()).add(target)


def _others(modules: frozenset[str], *, denoiser: bool) -> Iterator[tuple[str, Meant]]:
    """What else the modules of a component are called in files."""
    for name in modules:
        if name.endswith(".to_out.0"):
            yield name.removesuffix(".0"), Meant((name,))
        if not denoiser:
            for brief in {name, name.removeprefix("text_model.")}:
                yield brief, Meant((name,))
                yield f"text_model.{brief}", Meant((name,))
                head, _, own = brief.rpartition(".")
                if head.endswith("self_attn"):  # older versions of diffusers named them as those of a UNet
                    for full in (head, f"text_model.{head}"):
                        yield f"{full}.to_{own.removesuffix('_proj')}", Meant((name,))
    if denoiser:
        for theirs, meaning in original(modules).items():
            yield theirs, Meant(meaning.modules, meaning.swapped)


class Targets:
    """The modules of a base, by the names that LoRA files have for them."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in base.specs}
        self._prefixes = prefixes(base)
        self._components: dict[str, _Component] = {}

    @property
    def components(self) -> tuple[str, ...]:
        """The components that the base has; none where it is no diffusion model."""
        return tuple(self._prefixes)

    def has(self, name: Name) -> bool:
        """Whether the base has the component that a name is in."""
        return any(component in self._prefixes for component in name.components)

    def find(self, name: Name, module: str, where: str) -> Meant | None:
        """What a name means; None where the base has no such module. `module`: the name as the file has it. Raises
        Refuse (`adapter-target`) where it fits several."""
        for component in name.components:
            if component not in self._prefixes:
                continue
            found = self._component(component)
            if not name.underscored:
                if name.rest in found.dotted:
                    return found.dotted[name.rest]
                continue
            fitting = found.underscored.get(name.rest, set())
            if len(fitting) > 1:
                listed = sorted(" + ".join(target.modules) for target in fitting)
                raise Refuse(
                    "adapter-target", f"{where}: {module} fits {listed[0]} and {listed[1]} of the base: ambiguous"
                )
            if fitting:
                return next(iter(fitting))
        return None

    def _component(self, name: str) -> _Component:
        if name not in self._components:
            prefix = self._prefixes[name]
            inside = (spec.name.removeprefix(prefix) for spec in self._base.specs if spec.name.startswith(prefix))
            modules = frozenset(one.removesuffix(".weight").removesuffix(".bias") for one in inside)
            self._components[name] = _Component(prefix, modules, denoiser=name not in ENCODERS)
        return self._components[name]


def prefixes(base: BaseModel) -> dict[str, str]:
    """The components of a diffusion model, and what the names of their tensors begin with; empty for any other base.

    A base that is one component stands for the first denoiser, or the first text encoder.
    """
    known = (*DENOISERS, "transformer_2", "controlnet", *ENCODERS)
    found = {part.prefix.rstrip("."): part.prefix for part in base.checkpoint.parts if part.prefix}
    if parts := {name: prefix for name, prefix in found.items() if name in known}:
        return parts
    config = base.checkpoint.config
    if "_class_name" in config:
        return {"unet" if str(config["_class_name"]).startswith("UNet") else "transformer": ""}
    return {ENCODERS[0]: ""} if config.get("model_type") in _ENCODER_TYPES else {}
