"""Tiny pipelines of the real classes of diffusers, with random weights. It needs diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

_TEXT = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _tokenizer(directory: Path) -> Any:
    directory.mkdir(exist_ok=True)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))


def _clip(*, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(**_TEXT)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def _t5() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )


def _vae() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)


def _unet(**more: Any) -> Any:
    given: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DConditionModel(**given | more)


def sd15(scratch: Path) -> Any:
    """As Stable Diffusion 1.5."""
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_tokenizer(scratch),
        unet=_unet(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scratch: Path) -> Any:
    """As Stable Diffusion XL."""
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(projection=True),
        tokenizer=_tokenizer(scratch),
        tokenizer_2=_tokenizer(scratch),
        unet=_unet(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 24,
            transformer_layers_per_block=(1, 1, 2),
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def flux(scratch: Path) -> Any:
    """As Flux."""
    return diffusers.FluxPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_t5(),
        tokenizer=_tokenizer(scratch),
        tokenizer_2=_tokenizer(scratch),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def sd3(scratch: Path) -> Any:
    """As Stable Diffusion 3.5."""
    return diffusers.StableDiffusion3Pipeline(
        vae=_vae(),
        text_encoder=_clip(projection=True),
        text_encoder_2=_clip(projection=True),
        text_encoder_3=_t5(),
        tokenizer=_tokenizer(scratch),
        tokenizer_2=_tokenizer(scratch),
        tokenizer_3=_tokenizer(scratch),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def wan(scratch: Path) -> Any:
    """As Wan 2.1, without its autoencoder."""
    del scratch
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
    )


PIPELINES: Mapping[str, Callable[[Path], Any]] = {"sd15": sd15, "sdxl": sdxl, "flux": flux, "sd3": sd3, "wan": wan}
DENOISER = {"sd15": "unet", "sdxl": "unet", "flux": "transformer", "sd3": "transformer", "wan": ""}


def saved(name: str, directory: Path) -> Path:
    """One of the pipelines with random weights, as diffusers saves it in `directory`."""
    torch.manual_seed(0)
    made = PIPELINES[name](directory.with_name(f"{directory.name}-words"))
    made.save_pretrained(directory)
    return directory
