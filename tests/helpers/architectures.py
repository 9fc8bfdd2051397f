"""Tiny random models of the real classes of transformers, one for each way of naming weights. Tests that need them are
skipped where transformers is not installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 32, "max_position_embeddings": 32, **WIDE}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"num_key_value_heads": 1, **ENDS, **TEXT}
SIGHT = {"image_size": 16, "patch_size": 8, **WIDE}
CLIP_TEXT = {"projection_dim": 8, **ENDS, **TEXT}
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
SEEING = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
MARKS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
GPT2 = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **ENDS}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 16,
}


def _llava(kind: str) -> Any:
    return getattr(transformers, kind)(
        text_config={"model_type": "llama", **LLAMA},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 8, **SIGHT},
        image_token_index=3,
        vision_feature_layer=-1,
    )


def _qwen(kind: str) -> Any:
    return getattr(transformers, kind)(text_config={"rope_scaling": ROPE, **LLAMA}, vision_config=SEEING, **MARKS)


def _config(kind: str, **settings: Any) -> Any:
    return getattr(transformers, kind)(**settings)


CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: _config("LlamaConfig", **LLAMA)),
    "llama_bare": ("LlamaModel", lambda: _config("LlamaConfig", **LLAMA)),
    "neox": ("GPTNeoXForCausalLM", lambda: _config("GPTNeoXConfig", **TEXT)),
    "gpt2": ("GPT2LMHeadModel", lambda: _config("GPT2Config", **GPT2)),
    "gpt2_bare": ("GPT2Model", lambda: _config("GPT2Config", **GPT2)),
    "bert": ("BertForMaskedLM", lambda: _config("BertConfig", **TEXT)),
    "bert_bare": ("BertModel", lambda: _config("BertConfig", **TEXT)),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: _config(
            "T5Config",
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
    ),
    "vit": ("ViTForImageClassification", lambda: _config("ViTConfig", num_labels=3, **SIGHT)),
    "dinov2": (
        "Dinov2Model",
        lambda: _config(
            "Dinov2Config", image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        ),
    ),
    "swin": (
        "SwinForImageClassification",
        lambda: _config(
            "SwinConfig", image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
        ),
    ),
    "clip": (
        "CLIPModel",
        lambda: _config(
            "CLIPConfig", text_config=CLIP_TEXT, vision_config={"projection_dim": 8, **SIGHT}, projection_dim=8
        ),
    ),
    "clip_text": ("CLIPTextModel", lambda: _config("CLIPTextConfig", **CLIP_TEXT)),
    "siglip_vision": ("SiglipVisionModel", lambda: _config("SiglipVisionConfig", **SIGHT)),
    "qwen2vl": ("Qwen2VLForConditionalGeneration", lambda: _qwen("Qwen2VLConfig")),
    "qwen2vl_bare": ("Qwen2VLModel", lambda: _qwen("Qwen2VLConfig")),
    "llava": ("LlavaForConditionalGeneration", lambda: _llava("LlavaConfig")),
    "llava_bare": ("LlavaModel", lambda: _llava("LlavaConfig")),
    "llava_next": ("LlavaNextForConditionalGeneration", lambda: _llava("LlavaNextConfig")),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        lambda: _config(
            "Gemma3Config",
            text_config={"head_dim": 8, **LLAMA},
            vision_config={"vision_use_head": False, **SIGHT},
            mm_tokens_per_image=4,
            image_token_index=3,
            boi_token_index=4,
            eoi_token_index=5,
        ),
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        lambda: _config(
            "MllamaConfig",
            text_config={"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}, **LLAMA},
            vision_config={
                "hidden_size": 16,
                "attention_heads": 2,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "intermediate_size": 24,
                "image_size": 16,
                "patch_size": 8,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
                "max_num_tiles": 1,
            },
            image_token_index=3,
        ),
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        lambda: _config(
            "Qwen2AudioConfig", text_config={"model_type": "qwen2", **LLAMA}, audio_config=AUDIO, audio_token_index=3
        ),
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        lambda: _config(
            "Wav2Vec2Config",
            conv_dim=[8, 8],
            conv_stride=[2, 2],
            conv_kernel=[3, 3],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
            vocab_size=32,
            **WIDE,
        ),
    ),
}


def made(name: str, seed: int = 0) -> Any:
    """A model of this architecture with random weights, in evaluation mode."""
    kind, config = CONFIGS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: an adapter of zeros hides a wrong name
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def written(model: Any, directory: Path) -> Path:
    """The same, as its class writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(directory)
    return directory


def inputs(name: str) -> dict[str, torch.Tensor]:
    """What a model of this architecture can read, pictures and sound included."""
    torch.manual_seed(3)
    ids = torch.tensor([[6, 7, 8, 9, 10, 11, 12, 13]])
    pixels = torch.randn(1, 3, 16, 16)
    seen = torch.tensor([[6, 3, 3, 3, 3, 11, 12, 13]])
    if name in ("vit", "dinov2", "swin", "siglip_vision"):
        return {"pixel_values": pixels}
    if name == "clip":
        return {"input_ids": ids, "pixel_values": pixels}
    if name in ("llava", "llava_bare"):
        return {"input_ids": seen, "pixel_values": pixels}
    if name == "gemma3":
        return {"input_ids": seen, "pixel_values": pixels, "token_type_ids": (seen == 3).long()}
    if name.startswith("qwen2vl"):
        grid = torch.tensor([[1, 4, 4]])
        return {
            "input_ids": torch.tensor([[6, 5, 3, 3, 3, 3, 12, 13]]),
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
            "image_grid_thw": grid,
            "mm_token_type_ids": (torch.tensor([[6, 5, 3, 3, 3, 3, 12, 13]]) == 3).long(),
        }
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    if name == "wav2vec2":
        return {"input_values": torch.randn(1, 200)}
    return {"input_ids": ids}


def answer(model: Any, name: str) -> torch.Tensor:
    """What it makes of them: its logits, or the last hidden state where it has no head."""
    with torch.no_grad():
        given = model.eval()(**inputs(name))
    return given.logits_per_image if name == "clip" else given[0] if "logits" not in given else given["logits"]
