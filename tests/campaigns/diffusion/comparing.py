"""LoRA files in every layout on tiny pipelines: load_lora_weights and fuse_lora of diffusers against our task vectors;
and a merge written as a LoRA, loaded by diffusers, against the full export. It needs diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.publish.diffusion import LoraFormat
from continual.publish.folder import Target
from continual.publish.lora import LoraTarget
from continual.tensors.adapters.loras.releases import unet
from tests.campaigns.diffusion.pipelines import DENOISER, saved
from tests.helpers.adapters import Tensors, task_vectors
from tests.helpers.diffusion import TEXT, factors, written

_CLASSES = {
    "sd15": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "flux": diffusers.FluxPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_NEAR = 1e-6
Shapes = dict[str, tuple[int, ...]]
Flux = tuple[tuple[str, tuple[int, int]], ...]
_FLUX: Flux = (
    ("img_attn_qkv", (96, 32)),
    ("img_attn_proj", (32, 32)),
    ("img_mlp_0", (128, 32)),
    ("img_mlp_2", (32, 128)),
    ("img_mod_lin", (192, 32)),
    ("txt_attn_qkv", (96, 32)),
    ("txt_attn_proj", (32, 32)),
    ("txt_mlp_0", (128, 32)),
    ("txt_mlp_2", (32, 128)),
    ("txt_mod_lin", (192, 32)),
)


class File(NamedTuple):
    """A LoRA file of a family."""

    family: str
    name: str
    tensors: Tensors


def layers(base: Path, component: str, *, within: str = "") -> Shapes:
    """The linear layers and convolutions of a component that a file can adapt."""
    (file,) = (base / component).glob("*.safetensors")
    text = component.startswith("text_encoder")
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in load_file(file).items()
        if name.endswith(".weight") and tensor.ndim in (2, 4) and within in name and "embed" not in name.split(".")[-2]
        if not text or name.removesuffix(".weight").endswith(TEXT)
    }


def of(found: Mapping[str, tuple[int, ...]], name: Callable[[str, str], str], alpha: str = "") -> Tensors:
    """A file of these layers; `name` says what `down` and `up` of a layer are called, `alpha` of its alpha. Diffusers
    takes one alpha for all layers where names have the processors in them, so all have the same."""
    file: Tensors = {}
    for seed, (module, shape) in enumerate(sorted(found.items())):
        down, up = factors(shape, 3, seed)
        file |= {name(module, "down"): down * 0.1, name(module, "up"): up * 0.1}
        if alpha:
            file[alpha.format(name(module, "down").partition(".")[0])] = torch.tensor(2.0)
    return file


def flat(prefix: str, named: Callable[[str], str] = str) -> Callable[[str, str], str]:
    """Names as Kohya has them."""
    return lambda module, way: f"{prefix}_{named(module).replace('.', '_')}.lora_{way}.weight"


def dotted(prefix: str, down: str = "lora_A", up: str = "lora_B") -> Callable[[str, str], str]:
    """Names as diffusers has them."""
    return lambda module, way: f"{prefix}.{module}.{down if way == 'down' else up}.weight"


def files(bases: Mapping[str, Path]) -> Iterator[File]:
    """A file in every layout of every family."""
    small, large = bases["sd15"], bases["sdxl"]
    words = layers(small, "text_encoder")
    for within in ("attentions", ""):
        found = layers(small, "unet", within=within)
        kohya = of(found, flat("lora_unet"), "{}.alpha") | of(words, flat("lora_te"), "{}.alpha")
        yield File("sd15", f"kohya {within}", kohya)
        yield File("sd15", f"diffusers {within}", of(found, dotted("unet")) | of(words, dotted("text_encoder")))
    linear = of(words, dotted("text_encoder", "lora_linear_layer.down", "lora_linear_layer.up"))
    attention = layers(small, "unet", within="attentions")
    yield File("sd15", "diffusers 0.2x", of(attention, dotted("unet", "lora.down", "lora.up")) | linear)
    tensors = load_file(next((large / "unet").glob("*.safetensors")))
    theirs = unet({name.rpartition(".")[0] for name in tensors})
    inside = of(layers(large, "unet"), flat("lora_unet", theirs.__getitem__), "{}.alpha")
    both = [
        of(layers(large, component), flat(head), "{}.alpha")
        for component, head in (("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2"))
    ]
    yield File("sdxl", "kohya", inside | both[0] | both[1])
    blocks = {f"double_blocks_{i}_{name}": shape for i in range(2) for name, shape in _FLUX}
    blocks |= {f"single_blocks_{i}_linear2": (32, 160) for i in range(2)}
    yield File("flux", "kohya", of(blocks, flat("lora_unet"), "{}.alpha"))
    yield File("flux", "diffusers", of(layers(bases["flux"], "transformer"), dotted("transformer")))
    found = {n: s for n, s in layers(bases["sd3"], "transformer").items() if "pos_embed" not in n}
    yield File("sd3", "diffusers", of(found, dotted("transformer")))


def loaded(family: str, directory: Path) -> Any:
    """A pipeline."""
    more = {"safety_checker": None} if family == "sd15" else {}
    return _CLASSES[family].from_pretrained(directory, **more)


def values(pipeline: Any) -> Tensors:
    """All tensors of the components of a pipeline that LoRA files can change."""
    return {
        f"{name}.{key}".replace("text_model.", ""): tensor.clone()
        for name in _COMPONENTS
        if getattr(pipeline, name, None) is not None
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def fused(family: str, base: Path, lora: Path) -> Any:
    """A pipeline with a LoRA merged into it by diffusers."""
    pipeline = loaded(family, base)
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora(components=[n for n in pipeline._lora_loadable_modules if getattr(pipeline, n, None)])
    pipeline.unload_lora_weights()
    return pipeline


def read_alike(file: File, base: Path, directory: Path) -> bool:
    """Whether diffusers changes what we fold, and by as much."""
    before, after = (
        values(loaded(file.family, base)),
        values(fused(file.family, base, written(directory, file.tensors))),
    )
    theirs = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    ours = {name.replace("text_model.", ""): t for name, t in task_vectors(base, directory)[0].items()}
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs.keys() & ours.keys())
    print(f"{file.family} {file.name}: {len(ours)} weights, {len(theirs)} of diffusers, at most {apart:.1e} apart")
    return ours.keys() == theirs.keys() and apart < _NEAR


def written_alike(family: str, form: LoraFormat, base: Path, directory: Path) -> bool:
    """Whether diffusers makes the full export of a merge out of its LoRA."""
    directory.mkdir()
    tuned = written(directory / "lora", of(layers(base, DENOISER[family]), dotted(DENOISER[family])))
    making.init(base, directory / "state", making.Recipe(rule="mean"))
    with api.open(directory / "state", write=True) as merge:
        outcome = merge.fold(tuned)
        assert outcome.fate == "folded", outcome.message
        whole = values(loaded(family, merge.export(Target(directory / "full"))))
        merge.export_lora(LoraTarget(directory / "out", 64, form=form))
    found, before = values(fused(family, base, directory / "out")), values(loaded(family, base))
    apart = max(float((found[name] - whole[name]).abs().max()) for name in whole if whole[name].is_floating_point())
    moved = sum(not torch.equal(whole[name], before[name]) for name in whole)
    print(f"{family} written as {form}: {moved} weights moved, at most {apart:.1e} from the full export")
    return moved > 0 and apart < _NEAR


def compare_all(directory: Path) -> int:
    """Compares everything; 1 if anything differs."""
    bases = {family: saved(family, directory / family) for family in _CLASSES}
    good = [read_alike(file, bases[file.family], directory / f"file-{i}") for i, file in enumerate(files(bases))]
    forms: tuple[tuple[str, LoraFormat], ...] = (
        ("sd15", "kohya"),
        ("sd15", "diffusers"),
        ("sdxl", "kohya"),
        ("flux", "diffusers"),
    )
    good += [written_alike(f, form, bases[f], directory / f"written-{f}-{form}") for f, form in forms]
    print(f"{sum(good)} of {len(good)} alike")
    return 0 if all(good) else 1
