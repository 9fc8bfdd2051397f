"""Models in several folders: those of sentence-transformers (`modules.json`) and pipelines of diffusers
(`model_index.json`). Which folders make one model, and what the names of their tensors begin with.

The tensors of the first module of sentence-transformers, the transformer, have their own names; those of every other
folder begin with the folder's: `2_Dense.linear.weight`, `unet.conv_in.weight`. What is in the weight files is for
`checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from continual.errors import Refuse
from continual.outside import Malformed, parse_json, shown
from continual.tensors.checkpoints.place import MANIFESTS, Place, is_within, read_json

MODULES, PIPELINE = MANIFESTS
CONFIG = "config.json"
COPIED = ("safety_checker",)
"""Components that are no part of what is merged: many fine-tunes leave them out. An export has the base's."""
MOST = 64
"""Folders of one model."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ROUTER = "router_config.json"
_ROUTERS = ("Router", "Asym")
_COMPONENTS = (
    "transformer",
    "transformer_2",
    "unet",
    "prior",
    "decoder",
    "controlnet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "vae",
)
"""Folders in which a repo without weights at its top may have the components of a pipeline."""
_WEIGHTED = (
    "Transformer",
    "MLMTransformer",
    "CLIPModel",
    "Dense",
    "StaticEmbedding",
    "WordEmbeddings",
    "LSTM",
    "CNN",
    "LayerNorm",
    "WeightedLayerPooling",
    "SparseAutoEncoder",
)
"""Modules of sentence-transformers that have weights, by their classes."""
_WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "FeatureExtractor", "ImageProcessor", "Processor", "Guider")
"""How the classes of components that have no weights end."""


class Part(NamedTuple):
    """A folder of a model: `folder` is its path in the model (empty: the top), `prefix` what its tensors' names begin
    with, `kind` the class that loads it. `weighted`: it is not whole without weights."""

    folder: str
    prefix: str
    kind: str = ""
    weighted: bool = True

    def name(self, file: str) -> str:
        """A file of it, relative to the model."""
        return f"{self.folder}/{file}" if self.folder else file


WHOLE = Part("", "")
"""The one part of a model that lies in one folder."""


def manifest_of(place: Place) -> str | None:
    """The file of a place that says which folders make the model; None where its files lie together. Raises Retry."""
    if place.only is not None:
        return None
    names = place.names()
    return next((name for name in MANIFESTS if name in names), None)


def parts_of(place: Place) -> tuple[Part, ...]:
    """The folders that make the model in a place, the one with the transformer first.

    Raises Refuse (`config`) if a file that says so is malformed or names a folder outside of the model, Retry.
    """
    manifest = manifest_of(place)
    if manifest == MODULES:
        found = tuple(_modules(place))
    elif manifest == PIPELINE:
        found = tuple(_components(place))
    else:
        found = tuple(_alone(place)) or (WHOLE,)
    if len(found) > MOST:
        raise Refuse("config", f"{place}: {manifest} names {len(found)} folders; at most {MOST} are read")
    if not found:
        raise Refuse("config", f"{place.file(str(manifest))}: names no folder of the model")
    folders = [part.folder for part in found]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise Refuse("config", f"{place.file(str(manifest))}: names the folder {shown(twice)} twice")
    return found


def settings_of(place: Place, parts: Sequence[Part]) -> tuple[str, ...]:
    """The small files by which two models with the same weights differ: what says which folders there are, and the
    settings of the modules after the first."""
    manifest = manifest_of(place)
    if manifest is None:
        return ()
    beside = [part.name(CONFIG) for part in parts[1:]] if manifest == MODULES else []
    return (manifest, *(name for name in beside if place.present(name)))


def has_weights(place: Place, part: Part) -> bool:
    """Whether a folder has safetensors files. Raises Refuse (`pickle`) where its weights are pickled only."""
    names = place.names(part.folder)
    if any(name.endswith(".safetensors") for name in names):
        return True
    pickled = sorted(name for name in names if name.endswith(PICKLED) and name != "training_args.bin")
    if part.weighted and pickled:
        raise Refuse(
            "pickle",
            f"{place.file(part.name(pickled[0]))}: pickled weights, which can run code when loaded; "
            "convert them to safetensors",
        )
    return False


def _modules(place: Place) -> Iterator[Part]:
    where = place.file(MODULES)
    try:
        body = parse_json(place.small(MODULES))
    except Malformed as error:
        raise Refuse("config", f"{where}: no valid JSON ({error})") from None
    if not isinstance(body, list) or not body:
        raise Refuse("config", f"{where}: no list of modules")
    first = True
    for entry in body:
        path, kind = (entry.get("path"), entry.get("type")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(kind, str):
            raise Refuse("config", f"{where}: {shown(entry)} is no module: it needs a path and a type")
        folder = _folder(path.rstrip("/"), where)
        short = kind.rpartition(".")[2]
        if short in _ROUTERS and (routed := f"{folder}/{_ROUTER}".lstrip("/")) and place.present(routed):
            yield from _routes(place, folder, routed)
        else:
            weighted = short in _WEIGHTED
            yield Part(folder, "" if first or not folder else f"{folder.replace('/', '.')}.", short, weighted)
        first = False


def _routes(place: Place, folder: str, routed: str) -> Iterator[Part]:
    """The modules below a router, each in a folder of its own."""
    where = place.file(routed)
    types = read_json(place, routed).get("types")
    if not isinstance(types, dict):
        raise Refuse("config", f"{where}: says no types of its modules")
    for name, kind in types.items():
        inner = _folder(f"{folder}/{name}" if folder else name, where)
        short = kind.rpartition(".")[2] if isinstance(kind, str) else ""
        yield Part(inner, f"{inner.replace('/', '.')}.", short, short in _WEIGHTED)


def _components(place: Place) -> Iterator[Part]:
    where = place.file(PIPELINE)
    for name, value in read_json(place, PIPELINE).items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2:
            continue
        kind = value[1]
        if isinstance(kind, str):
            yield Part(_folder(name, where), f"{name}.", kind, name not in COPIED and not kind.endswith(_WEIGHTLESS))


def _alone(place: Place) -> Iterator[Part]:
    """The components that lie in folders, where neither weights nor an adapter lie at the top."""
    if place.only is not None or any(name.endswith((".safetensors", *PICKLED)) for name in place.names()):
        return
    for name in _COMPONENTS:
        inside = place.names(name)
        if CONFIG in inside and any(file.endswith(".safetensors") for file in inside):
            yield Part(name, f"{name}.")


def _folder(path: str, where: str) -> str:
    if path and not is_within(path):
        raise Refuse("config", f"{where}: names {shown(path)}, which is no folder in the model")
    return path


def differing(ours: Place, theirs: Place) -> str | None:
    """What the settings of two models in parts say differently, in words, as far as it changes what they compute; None
    where it is nothing. Raises Refuse (`config`) for malformed settings, Retry."""
    manifests = manifest_of(ours), manifest_of(theirs)
    if manifests == (MODULES, MODULES):
        return _differing_modules(ours, theirs)
    if manifests == (PIPELINE, PIPELINE):
        said = [_prediction(place) for place in (ours, theirs)]
        if None not in said and said[0] != said[1]:
            return f"its scheduler's prediction_type is {shown(said[1])}, the base's {shown(said[0])}"
    return None


def _differing_modules(ours: Place, theirs: Place) -> str | None:
    pairs = parts_of(ours), parts_of(theirs)
    kinds = [[part.kind for part in parts] for parts in pairs]
    if kinds[0] != kinds[1]:
        return f"its {MODULES} has {', '.join(map(shown, kinds[1]))}; the base's {', '.join(map(shown, kinds[0]))}"
    for one, other in zip(*pairs, strict=True):
        if one.kind not in ("Pooling", "Dense"):
            continue
        said = [_says(place, part) for place, part in ((ours, one), (theirs, other))]
        for key in sorted({*said[0], *said[1]} if all(said) else ()):
            before, after = (body.get(key) for body in said)
            if before != after:
                return f"{other.name(CONFIG)} has {key} = {shown(after)}, the base's {shown(before)}"
    return None


def _says(place: Place, part: Part) -> Mapping[str, object]:
    """The settings of a module that change what it computes, in the words of the newest sentence-transformers; empty
    where it has none."""
    name = part.name(CONFIG)
    if not place.present(name):
        return {}
    body = read_json(place, name)
    if part.kind == "Dense":
        return {"activation_function": str(body.get("activation_function", "Tanh")).rpartition(".")[2]}
    modes = body.get("pooling_mode")
    if modes is None:
        modes = [_POOLINGS.get(key, key) for key, value in body.items() if key.startswith("pooling_mode_") and value]
    listed = sorted(str(mode) for mode in modes) if isinstance(modes, list) else [str(modes)]
    return {"pooling_mode": ", ".join(listed or ["mean"]), "include_prompt": body.get("include_prompt", True)}


_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How older versions of sentence-transformers said how tokens are pooled."""


def _prediction(place: Place) -> object:
    name = "scheduler/scheduler_config.json"
    return read_json(place, name).get("prediction_type", "epsilon") if place.present(name) else None
