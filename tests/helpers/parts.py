"""Small models in several folders, as sentence-transformers and diffusers write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

ENCODER = {"embeddings.word_embeddings.weight": (12, 8), "encoder.layer.0.output.dense.weight": (8, 8)}
DENSE = {"linear.weight": (4, 8), "linear.bias": (4,)}
UNET = {"conv_in.weight": (8, 4, 3, 3), "mid_block.attentions.0.proj_in.weight": (8, 8), "conv_out.bias": (4,)}
TEXT = {"text_model.embeddings.token_embedding.weight": (12, 8), "text_model.encoder.layers.0.mlp.fc1.weight": (16, 8)}
VAE = {"decoder.conv_in.weight": (8, 4, 3, 3), "quant_conv.bias": (8,)}
SHORT = "sentence_transformers.models."


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int, shift: float) -> dict[str, torch.Tensor]:
    """Random tensors that all models have, plus a random task vector of the fine-tune `seed`."""
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + seed)
    return {
        name: torch.randn(shape, generator=ours) * 0.1 + torch.randn(shape, generator=theirs) * shift
        for name, shape in shapes.items()
    }


def put(directory: Path, files: Mapping[str, object]) -> Path:
    """Writes files of a model: tensors as safetensors, bytes as they are, and anything else as JSON."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".safetensors"):
            assert isinstance(content, dict)
            save_file(content, path, metadata={"format": "pt"})
        else:
            path.write_text(json.dumps(content))
    return directory


def embedder(
    directory: Path,
    seed: int = 0,
    *,
    root: str = "",
    mode: str = "mean_tokens",
    dense: bool = True,
    size: float = 0.01,
) -> Path:
    """A model of sentence-transformers: a transformer in the folder `root`, pooling, a Dense layer, and a
    normalisation."""
    shift = size if seed else 0.0
    modules = [(root, "Transformer"), ("1_Pooling", "Pooling"), *([("2_Dense", "Dense")] if dense else [])]
    modules.append(("3_Normalize", "Normalize"))
    head = f"{root}/" if root else ""
    files: dict[str, object] = {
        f"{head}model.safetensors": weights(ENCODER, seed, shift),
        f"{head}config.json": {"model_type": "bert", "tie_word_embeddings": False},
        f"{head}sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
        f"{head}tokenizer.json": {"version": "1.0"},
        "1_Pooling/config.json": {"word_embedding_dimension": 8, f"pooling_mode_{mode}": True},
        "config_sentence_transformers.json": {"prompts": {}},
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": SHORT + kind} for i, (path, kind) in enumerate(modules)
        ],
    }
    if dense:
        files["2_Dense/model.safetensors"] = weights(DENSE, seed, shift)
        files["2_Dense/config.json"] = {
            "in_features": 8,
            "out_features": 4,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
    return put(directory, files)


def component(shapes: Mapping[str, tuple[int, ...]], seed: int, form: str, stem: str) -> dict[str, object]:
    """The weight files of one component. `form`: `one` file, two `shards`, or the name of a variant."""
    tensors = weights(shapes, seed, 0.01 if seed else 0.0)
    if form == "one":
        return {f"{stem}.safetensors": tensors}
    if form != "shards":
        return {f"{stem}.{form}.safetensors": {name: tensor.half() for name, tensor in tensors.items()}}
    found: dict[str, object] = {}
    where: dict[str, str] = {}
    for i, names in enumerate((list(tensors)[:1], list(tensors)[1:]), 1):
        file = f"{stem}-{i:05d}-of-00002.safetensors"
        found[file] = {name: tensors[name] for name in names}
        where |= dict.fromkeys(names, file)
    return found | {f"{stem}.safetensors.index.json": {"metadata": {}, "weight_map": where}}


def pipeline(directory: Path, seed: int = 0, *, form: str = "one", checker: bool = True) -> Path:
    """A pipeline of diffusers with a UNet, a text encoder, an autoencoder and what has no weights."""
    stem = "diffusion_pytorch_model"
    folders = {
        "unet": component(UNET, seed, form, stem) | {"config.json": {"_class_name": "UNet2DConditionModel"}},
        "text_encoder": component(TEXT, seed, form, "model") | {"config.json": {"model_type": "clip_text_model"}},
        "vae": component(VAE, seed, "one" if form == "shards" else form, stem)
        | {"config.json": {"_class_name": "AutoencoderKL"}},
        "scheduler": {"scheduler_config.json": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}},
        "tokenizer": {"vocab.json": {}, "merges.txt": b""},
    }
    index: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "requires_safety_checker": checker,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if checker else [None, None],
        "feature_extractor": [None, None],
    }
    if checker:
        folders["safety_checker"] = {
            "model.safetensors": weights({"special_care_embeds": (3, 8)}, 0, 0.0),
            "config.json": {"model_type": "clip"},
        }
    files = {f"{folder}/{name}": content for folder, inside in folders.items() for name, content in inside.items()}
    return put(directory, {"model_index.json": index, **files})
