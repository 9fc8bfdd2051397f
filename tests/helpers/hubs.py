"""Models on the loopback Hub, and states that read from it: helpers of the tests of everything about the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from continual import making
from continual.api import Merge
from continual.config import Settings
from continual.hub import Hub as Client
from tests import loopback as hubs
from tests.helpers import models
from tests.loopback import Hub

BASE = "org/base"


def card(base: str | None = BASE, **facts: Any) -> bytes:
    """A README whose metadata name a base."""
    lines = [f"base_model: {base}"] if base else []
    lines += [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    return ("---\n" + "\n".join(lines) + "\n---\n# A model\n").encode()


def files_of(directory: Path) -> dict[str, bytes]:
    """All files of a model directory."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def publish(hub: Hub, repo: str, directory: Path, readme: bytes | None = None, **facts: Any) -> str:
    """Makes the repo if need be, and commits a model directory with a card to it in one commit; its sha."""
    if repo not in hub.state():
        hub.create(repo, **facts)
    return hub.commit(repo, files_of(directory) | {"README.md": card() if readme is None else readme})


@contextmanager
def merge(
    state: Path, server: Hub, /, *, write: bool = True, token: str | None = hubs.TOKEN, **settings: Any
) -> Iterator[Merge]:
    """The state, opened with a client of this Hub."""
    client = Client(endpoint=server.endpoint, token=token)
    with Merge(Settings(state=state, **settings), write=write, client=client) as found:
        yield found


def made(tmp: Path, hub: Hub, rule: str = "task-arithmetic", **shape: Any) -> Path:
    """A base in a folder and on the Hub, and a state of it; the base's directory."""
    base = models.base(tmp / "base", **shape)
    publish(hub, BASE, base, card(None, license="apache-2.0"))
    making.init(base, tmp / "state", making.Recipe(rule=rule))
    return base


def sums(merge_: Merge) -> Mapping[str, np.ndarray]:
    """Every accumulator in force, bit for bit."""
    made_ = merge_.state.format
    return {f"{slot}/{t.name}": merge_.state.read(t.name, slot) for t in made_.tensors for slot in made_.slots[t.name]}


def equal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether two merges have the same bits."""
    return a.keys() == b.keys() and all(x.tobytes() == b[name].tobytes() for name, x in a.items())


def sharded(tuned: Path, directory: Path, shards: int = 3) -> Path:
    """The weights of a model directory in several files with an index."""
    tensors, weight_map = load_file(tuned / "model.safetensors"), {}
    directory.mkdir()
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text((tuned / "config.json").read_text())
    return directory


def adapter(base: Path, directory: Path, seed: int, module: str = "layers.0.self_attn.q_proj", rank: int = 4) -> Path:
    """A LoRA adapter of one matrix of a base."""
    rows, columns = load_file(base / "model.safetensors")[f"model.{module}.weight"].shape
    random = torch.Generator().manual_seed(3000 + seed)
    factors = {"A": torch.randn(rank, columns, generator=random), "B": torch.randn(rows, rank, generator=random)}
    directory.mkdir()
    named = {
        f"base_model.model.model.{module}.lora_{letter}.weight": factor * 0.02 for letter, factor in factors.items()
    }
    save_file(named, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [module],
        "base_model_name_or_path": BASE,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
