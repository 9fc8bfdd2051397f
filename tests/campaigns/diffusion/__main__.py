"""What diffusers calls the modules of its models, and what the names of other trainers mean to it: a table for tests.

    PYTHON -m tests.campaigns.diffusion

with the Python of an environment that has diffusers; it writes tests/data/names_of_diffusers.json: the tensors of the
tiny pipelines in pipelines.py with their shapes, and Kohya's names for the modules of SDXL's UNet as diffusers reads
them. With

    PYTHON -m tests.campaigns.diffusion --compare DIRECTORY

it compares what diffusers makes of LoRA files with what continual does (comparing.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path

import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import safe_open

from continual.tensors.adapters.loras.releases import unet
from tests.campaigns.diffusion.comparing import compare_all
from tests.campaigns.diffusion.pipelines import PIPELINES, saved

TABLE = Path(__file__).parents[2] / "data" / "names_of_diffusers.json"


def tensors(directory: Path) -> dict[str, list[int]]:
    """The tensors of a model by name, those of the components but the autoencoder, with their shapes."""
    found: dict[str, list[int]] = {}
    for file in sorted(directory.rglob("*.safetensors")):
        component = file.parent.relative_to(directory).as_posix()
        if component == "vae":
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                full = name if component == "." else f"{component}.{name}"
                found[full] = opened.get_slice(name).get_shape()
    return found


def kohya(names: dict[str, list[int]]) -> dict[str, str]:
    """What diffusers takes Kohya's names of SDXL's modules for. The names are ours; what they mean is told by it."""
    inside = [name.removeprefix("unet.") for name in names if name.startswith("unet.") and name.endswith(".weight")]
    modules = [name.removesuffix(".weight") for name in inside if len(names[f"unet.{name}"]) > 1]
    theirs = unet({name.removeprefix("unet.").rpartition(".")[0] for name in names if name.startswith("unet.")})
    found: dict[str, str] = {}
    for module in modules:
        flat = "lora_unet_" + theirs[module].replace(".", "_")
        state = {f"{flat}.lora_down.weight": torch.zeros(1), f"{flat}.lora_up.weight": torch.zeros(1)}
        state = _maybe_map_sgm_blocks_to_diffusers(state, types.SimpleNamespace(layers_per_block=2))
        state, _ = _convert_non_diffusers_lora_to_diffusers(state)
        peft = convert_unet_state_dict_to_peft(state)
        (name,) = (name for name in peft if "lora_A" in name or ".down." in name)
        found[flat] = name.removeprefix("unet.").rpartition(".lora")[0]
    return found


def main() -> None:
    """Writes the table, or compares."""
    if sys.argv[1:2] == ["--compare"]:
        sys.exit(compare_all(Path(sys.argv[2])))
    with tempfile.TemporaryDirectory() as scratch:
        made = {name: tensors(saved(name, Path(scratch) / name)) for name in PIPELINES}
    table = {"tensors": made, "kohya": kohya(made["sdxl"])}
    TABLE.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
