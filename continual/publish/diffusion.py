"""The layouts of LoRA files of diffusion models: which tensors of a base such a file can hold, and what its factors are
called there.

`diffusers`: as its save_lora_weights writes them. `kohya`: as sd-scripts does, under the names of diffusers for Stable
Diffusion 1 and 2 and under those of the release for Stable Diffusion XL. Both are read by load_lora_weights of
diffusers; what that cannot load into a pipeline (the autoencoder, T5, norms and biases) is left out and said. Kohya's
files of other families have fused modules, which factors of their parts are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from continual.errors import Misconfigured
from continual.publish.adaptable import Adapted
from continual.records import TensorSpec
from continual.tensors import BaseModel
from continual.tensors.adapters.loras.architecture import SDXL, kinds_of
from continual.tensors.adapters.loras.releases import unet
from continual.tensors.adapters.loras.targets import ENCODERS, prefixes
from continual.tensors.names.kinds import kind_of

LoraFormat = Literal["peft", "kohya", "diffusers"]
FORMATS: tuple[LoraFormat, ...] = ("peft", "kohya", "diffusers")
"""The layouts of an adapter."""
FILES: Mapping[LoraFormat, str] = {
    "peft": "adapter_model.safetensors",
    "kohya": "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
}
"""What the weight file of an adapter is called in each."""
_IN_ENCODERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""Layers of a text encoder that diffusers loads factors for."""
_WORDS = dict(zip(ENCODERS, ("te1", "te2", "te3"), strict=True))
_VERSIONS = {SDXL: "sdxl_base_v1-0", "Stable Diffusion 1": "sd_v1", "Stable Diffusion 2": "sd_v2"}


def adaptable_in(base: BaseModel, form: LoraFormat) -> tuple[Adapted, ...]:
    """The tensors of a diffusion model that a file of this layout can hold, in name order. Raises Misconfigured where
    the base is none, or where the layout cannot express it."""
    components = prefixes(base)
    if not components:
        raise Misconfigured(
            f"{base.checkpoint.place}: is no diffusion model in the layout of diffusers: write its adapter with "
            "--format peft"
        )
    denoiser = next((name for name in ("transformer", "unet") if name in components), None)
    if form == "kohya" and denoiser != "unet":
        raise Misconfigured(
            f"{base.checkpoint.place}: Kohya's layout of such a model puts several layers into one, which their "
            "factors are not: write its adapter with --format diffusers"
        )
    several = sum(name in ENCODERS for name in components) > 1
    release = _release(base, components["unet"]) if form == "kohya" and SDXL in kinds_of(base) else {}
    found: list[Adapted] = []
    for component, prefix in components.items():
        if component not in (denoiser, *ENCODERS):
            continue
        for spec, module in _layers(base, component, prefix):
            if form == "diffusers":
                head, down, up, alpha = f"{component}.{module}", "lora_A", "lora_B", None
            else:
                word = "unet" if component == denoiser else _WORDS[component] if several else "te"
                head = f"lora_{word}_{release.get(module, module).replace('.', '_')}"
                down, up, alpha = "lora_down", "lora_up", f"{head}.alpha"
            found.append(Adapted(spec, head, False, False, (f"{head}.{down}.weight", f"{head}.{up}.weight"), alpha))
    return tuple(sorted(found, key=lambda one: one.spec.name))


def header_of(base: BaseModel, form: LoraFormat, rank: int) -> dict[str, str]:
    """What the header of a file says of itself in this layout."""
    if form != "kohya":
        return {}
    said = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    kinds = kinds_of(base)
    return said | ({"ss_base_model_version": _VERSIONS[min(kinds)]} if len(kinds) == 1 else {})


def _layers(base: BaseModel, component: str, prefix: str) -> Iterator[tuple[TensorSpec, str]]:
    """The weights of a component that can have factors, and their modules in the component."""
    inside = [spec for spec in base.specs if spec.name.startswith(prefix) and spec.kind != "carried"]
    if component in ENCODERS and any("SelfAttention" in spec.name for spec in inside):
        return  # T5
    for spec in inside:
        module = spec.name.removeprefix(prefix).removesuffix(".weight")
        if not spec.name.endswith(".weight") or len(spec.shape) not in (2, 4) or not spec.numel:
            continue
        if component in ENCODERS:
            if module.endswith(_IN_ENCODERS):
                yield spec, "text_model." + module.removeprefix("text_model.")
        elif kind_of(spec.name, spec.shape, spec.dtype) == "matrix":
            yield spec, module


def _release(base: BaseModel, prefix: str) -> dict[str, str]:
    """What the release calls the modules of a UNet."""
    inside = (spec.name.removeprefix(prefix) for spec in base.specs if spec.name.startswith(prefix))
    return unet({name.rpartition(".")[0] for name in inside})
