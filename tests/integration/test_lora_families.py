"""The merge as an adapter for each way in which a family names its weights: PEFT puts on the base exactly what was
merged, in the text and beside it."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.errors import Misconfigured
from continual.executors.contract import silent
from continual.publish import lora
from continual.publish.adaptable import adaptable
from continual.publish.folder import Target
from tests.helpers import architectures, models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
FAMILIES = (
    "bert",
    "bert_bare",
    "clip",
    "clip_text",
    "dinov2",
    "gemma3",
    "gpt2",
    "llama",
    "llava",
    "neox",
    "qwen2vl",
    "swin",
    "t5",
    "vit",
)


def merged(tmp_path: Path, base: Path) -> tuple[Path, lora.LoraReport]:
    """A merge of two fine-tunes that changed what an adapter can have, as a full model and as an adapter."""
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    with api.open(tmp_path / "state", write=True, gates=["noise.act=off"]) as merge:
        able = {one.spec.name for one in adaptable(merge.base)}
        origin = load_file(base / "model.safetensors")
        for seed in range(2):
            tuned = {}
            for name, tensor in origin.items():
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
                tuned[name] = tensor + 0.05 * noise if name in able else tensor
            directory = tmp_path / f"ft-{seed}"
            directory.mkdir()
            save_file(tuned, directory / "model.safetensors", metadata={"format": "pt"})
            (directory / "config.json").write_bytes((base / "config.json").read_bytes())
            assert merge.fold(directory).fate == "folded"
        report = lora.export(
            merge.base, merge.reading(), lora.LoraTarget(tmp_path / "adapter", 1000), merge.executor, silent
        )
        return merge.export(Target(tmp_path / "full")), report


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_adapts_exactly_what_was_merged(name: str, tmp_path: Path) -> None:
    base = architectures.written(architectures.made(name), tmp_path / "base")
    full, report = merged(tmp_path, base)
    assert report.error < 1e-5
    kind = getattr(transformers, architectures.CONFIGS[name][0])
    whole = kind.from_pretrained(full)
    untouched = architectures.answer(kind.from_pretrained(base), name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of factors that it does not find a module for
        adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(base), report.directory)
    wanted = architectures.answer(whole, name)
    assert not torch.allclose(wanted, untouched, atol=1e-3)
    torch.testing.assert_close(architectures.answer(adapted, name), wanted, rtol=0, atol=2e-4)
    inside: Any = adapted.merge_and_unload()
    for parameter, value in whole.state_dict().items():
        torch.testing.assert_close(inside.state_dict()[parameter], value, rtol=0, atol=1e-5, msg=parameter)


def test_a_family_of_unknown_names_is_refused(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    config = base / "config.json"
    config.write_text(config.read_text().replace("llama", "yolos"))
    making.init(base, tmp_path / "state")
    with api.open(tmp_path / "state", write=True, gates=["noise.act=off"]) as merge:
        merge.fold(models.fine_tune(base, tmp_path / "ft", 0))
        with pytest.raises(Misconfigured, match="yolos under other names"):
            lora.export(merge.base, merge.reading(), lora.LoraTarget(tmp_path / "out", 4), merge.executor, silent)
