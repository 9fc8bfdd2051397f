"""What a file is that is no safetensors checkpoint, and what its publisher or its user can do: known by its first
bytes, by the names of a directory, or by the names of the tensors in it. Each is said in one line.

Nothing here opens a file. Checkpoints that are quantised are the matter of quantised.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from continual.errors import Refuse
from continual.outside import shown

HEAD = 64
"""So many bytes at the beginning of a file tell what it is."""


class Foreign(NamedTuple):
    """Why something is refused: the `reason`, `what` it is, and what to `do`."""

    reason: str
    what: str
    do: str


_CONVERT = "convert it to safetensors (load it with transformers and call save_pretrained)"
_MAGIC: tuple[tuple[bytes, Foreign], ...] = (
    (
        b"version https://git-lfs",
        Foreign("foreign", "a Git LFS pointer, not the file that it stands for", "run 'git lfs pull' there"),
    ),
    (
        b"/annex/objects/",
        Foreign("foreign", "a git-annex pointer, not the file that it stands for", "run 'git annex get' there"),
    ),
    (
        b"# xet version",
        Foreign("foreign", "a Xet pointer, not the file that it stands for", "download the file"),
    ),
    (b"GGUF", Foreign("foreign", "a GGUF file (llama.cpp)", "use the safetensors model that it was made from")),
    (b"ggjt", Foreign("foreign", "a GGML file (llama.cpp)", "use the safetensors model that it was made from")),
    (
        b"PK\x03\x04",
        Foreign("pickle", "a zip archive, as torch.save writes it: a pickle, which can run code when loaded", _CONVERT),
    ),
    (b"\x80\x02", Foreign("pickle", "a pickle, which can run code when loaded", _CONVERT)),
    (b"\x80\x03", Foreign("pickle", "a pickle, which can run code when loaded", _CONVERT)),
    (b"\x80\x04", Foreign("pickle", "a pickle, which can run code when loaded", _CONVERT)),
    (b"\x80\x05", Foreign("pickle", "a pickle, which can run code when loaded", _CONVERT)),
    (b"\x89HDF", Foreign("foreign", "an HDF5 file, as Keras writes it", _CONVERT)),
    (b"\x93NUMPY", Foreign("foreign", "a NumPy array", _CONVERT)),
    (b"\x1f\x8b", Foreign("foreign", "a gzip archive", "unpack it")),
    (b"\x28\xb5\x2f\xfd", Foreign("foreign", "a Zstandard archive", "unpack it")),
    (b"7z\xbc\xaf", Foreign("foreign", "a 7-Zip archive", "unpack it")),
)
_PAGE = Foreign("foreign", "an HTML page, as a server sends it in place of a file", "download the file again")
_ANSWER = Foreign("foreign", "a JSON text, as a server sends it in place of a file", "download the file again")
_TEXT = Foreign("foreign", "a text", "download the file again")
_ZEROS = Foreign("foreign", "zeros at its beginning: a download that was cut off", "download the file again")


def by_bytes(head: bytes) -> Foreign | None:
    """What a file is that begins with `head`; None for what may be a safetensors file, or is not known."""
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if len(head) >= 16 and not any(head):
        return _ZEROS
    if b"\0" in head[:8]:
        return None
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:HEAD].lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return _PAGE
    if start.startswith((b"{", b"[")):
        return _ANSWER
    return _TEXT if len(head) >= 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head) else None


def check_bytes(head: bytes, where: str) -> None:
    """Raises Refuse where a file that is no safetensors file is known by its first bytes: `foreign` or `pickle`."""
    if found := by_bytes(head):
        raise Refuse(found.reason, f"{where}: no safetensors file but {found.what}; {found.do}")


def check_text(head: bytes, where: str) -> None:
    """Raises Refuse (`foreign`) where a small file is a pointer, or a page of a server, in its place."""
    found = by_bytes(head)
    if found is not None and found not in (_ANSWER, _TEXT, _ZEROS):
        raise Refuse(found.reason, f"{where}: {found.what}; {found.do}")


_NAMED: tuple[tuple[str, Foreign], ...] = (
    (
        r"zero_pp_rank_\d+_.*|bf16_zero_pp_rank_.*|global_step\d+|zero_to_fp32\.py|mp_rank_\d+_.*",
        Foreign(
            "sharded-state",
            "a DeepSpeed checkpoint, whose parts only DeepSpeed can put together",
            "run its zero_to_fp32.py with --safe_serialization, and publish what that writes",
        ),
    ),
    (
        r"pytorch_model_fsdp\.bin|pytorch_model_fsdp_\d+|.*\.distcp|\.metadata",
        Foreign(
            "sharded-state",
            "an FSDP checkpoint, whose parts only torch can put together",
            "run 'accelerate merge-weights DIR OUT', and publish what that writes",
        ),
    ),
    (
        r"model_optim_rng\.pt|latest_checkpointed_iteration\.txt|.*\.nemo",
        Foreign("sharded-state", "a checkpoint of Megatron or NeMo", "export it to the layout of transformers"),
    ),
    (
        r".*\.(gguf|ggml)",
        Foreign("foreign", "a GGUF model (llama.cpp)", "use the safetensors model that it was made from"),
    ),
    (
        r".*\.onnx|.*\.onnx_data",
        Foreign("foreign", "an ONNX model", "use the safetensors model that it was exported from"),
    ),
    (
        r"openvino_.*\.(xml|bin)",
        Foreign("foreign", "an OpenVINO model", "use the safetensors model that it was exported from"),
    ),
    (
        r"(weights|model).*\.npz",
        Foreign("foreign", "an MLX model", "use the safetensors model that it was converted from"),
    ),
    (
        r"tf_model.*\.h5|.*\.h5|.*\.keras|saved_model\.pb|.*\.tflite|.*\.ckpt\.(index|data-.*|meta)",
        Foreign(
            "foreign",
            "a TensorFlow model",
            "load it in transformers 4 with from_tf=True and save it with save_pretrained",
        ),
    ),
    (
        r"flax_model.*\.msgpack|.*\.msgpack|.*\.orbax.*|_CHECKPOINT_METADATA",
        Foreign(
            "foreign",
            "a Flax model",
            "load it in transformers 4 with from_flax=True and save it with save_pretrained",
        ),
    ),
    (
        r".*\.(mlmodel|mlpackage|mlmodelc)|.*\.(engine|plan|pte|rknn|ot)",
        Foreign("foreign", "a model that was compiled for a device", "use the safetensors model that it was made from"),
    ),
    (
        r".*\.(bin|pt|pth|ckpt|pkl)",
        Foreign("pickle", "only pickled weights, which can run code when loaded", "convert them to safetensors"),
    ),
    (
        r"checkpoint-\d+",
        Foreign("no-weights", "a trainer's checkpoints in folders", "publish the one that is meant, by itself"),
    ),
    (
        r".*\.(zip|tar|tgz|gz|xz|zst|bz2|7z|rar)",
        Foreign("foreign", "an archive", "unpack it, and publish what is in it"),
    ),
)
_PATTERNS = tuple((re.compile(pattern), found) for pattern, found in _NAMED)


def by_names(names: Iterable[str]) -> tuple[str, Foreign] | None:
    """What a directory without a safetensors file is, by the name of a file or folder in it, which is given too."""
    listed = sorted(names)
    for pattern, found in _PATTERNS:
        if name := next((name for name in listed if pattern.fullmatch(name)), None):
            return name, found
    return None


def refuse_names(names: Collection[str], where: str) -> Refuse:
    """The refusal of a directory in which there is no safetensors file, naming what is there instead."""
    found = by_names(names)
    if found is None:
        return Refuse("no-weights", f"{where}: no safetensors file in it; publish the weights as model.safetensors")
    name, what = found
    return Refuse(what.reason, f"{where}: no safetensors file in it, but {what.what} ({shown(name)}); {what.do}")


_LAYOUTS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.w[123])\.weight"),
        "the names of Meta's and Mistral's own code (consolidated.safetensors), which also orders rows otherwise",
        "convert it with the script of its family in transformers, and publish that",
    ),
    (
        re.compile(r"(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders)\..+"),
        "a pipeline in one file, as CompVis, ComfyUI and Kohya write it",
        "load it in diffusers with from_single_file, and publish what save_pretrained writes",
    ),
    (
        re.compile(r"(?:model\.)?(?:decoder|language_model\.encoder)\.layers\.\d+\.self_attention\.linear_qkv\.weight"),
        "the names of Megatron or NeMo",
        "export it to the layout of transformers",
    ),
    (
        re.compile(r"(?:blk\.\d+\.attn_q|token_embd)\.weight"),
        "the names of llama.cpp",
        "use the safetensors model that it was made from",
    ),
)
"""Layouts of whole models by the name of a tensor: what they are, and what to do."""


def layout_of(names: Iterable[str]) -> tuple[str, str, str] | None:
    """The first of these names that tells a layout which is neither that of transformers nor of diffusers, what that
    layout is, and what to do; None where there is none."""
    for name in names:
        for pattern, what, do in _LAYOUTS:
            if pattern.fullmatch(name):
                return name, what, do
    return None


_KOHYA = re.compile(
    r"(?:lora_(?:unet|te\d?|transformer|prior)|lycoris)_\w+"
    r"\.(?:lora_(?:down|up|mid)|hada_|lokr_|dora_|diff(?:_b)?$|[wb]_norm$|oft_|[ab][12]\.weight$)"
)
_FACTOR = re.compile(
    r"\.(?:lora_(?:A|B|down|up|embedding_A|embedding_B|magnitude_vector)|lora\.(?:down|up)"
    r"|lora_linear_layer\.(?:down|up)|(?:to_(?:q|k|v|out)|qkv|proj)_lora\d?\.(?:down|up)|hada_[wt][12](?:_[ab])?"
    r"|lokr_[wt][12](?:_[ab])?)"
    r"(?=\.|$)"
)


def is_factor(name: str) -> bool:
    """Whether a tensor's name is that of a factor of an adapter, which is no weight by itself."""
    return bool(_FACTOR.search(name) or _KOHYA.match(name))


_RELEASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"conditioner\.embedders\.\d"), "StableDiffusionXLPipeline"),
    (re.compile(r"cond_stage_model\."), "StableDiffusionPipeline"),
    (re.compile(r"model\.diffusion_model\.input_blocks\."), "StableDiffusionPipeline"),
    (re.compile(r"(?:model\.diffusion_model\.)?joint_blocks\.\d+\.x_block\."), "SD3Transformer2DModel"),
    (re.compile(r"(?:model\.diffusion_model\.)?double_blocks\.\d+\.img_attn\.qkv\."), "FluxTransformer2DModel"),
    (re.compile(r"(?:model\.diffusion_model\.)?input_blocks\.\d+\.0\."), "UNet2DConditionModel"),
    (re.compile(r"(?:model\.diffusion_model\.)?blocks\.\d+\.self_attn\.norm_q\."), "WanTransformer3DModel"),
    (re.compile(r"first_stage_model\."), "AutoencoderKL"),
)
"""Names of tensors in the releases of diffusion models, and the class of diffusers that reads one."""


class Release(NamedTuple):
    """That a checkpoint is in the layout of a release: a `tensor` that says so, and the class of diffusers that reads
    it."""

    tensor: str
    reader: str


def release_of(names: Collection[str]) -> Release | None:
    """Whether a checkpoint holds a diffusion model in the layout of its release, and not in that of diffusers."""
    for pattern, reader in _RELEASES:
        if found := next((name for name in names if pattern.match(name)), None):
            return Release(found, reader)
    return None
