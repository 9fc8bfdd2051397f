"""What is fetched of candidates that their headers refuse."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from continual import making
from tests.helpers import models
from tests.helpers.hubs import BASE, card, merge
from tests.loopback import Hub

MB = 1e6


def raw(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file of zeros."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        nbytes = torch.Size(shape).numel() * {"BF16": 2, "F32": 4, "I32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(at)


def refused(work: Path, hub: Hub, _: argparse.Namespace) -> None:
    work = work / "refused"
    layer = {n: s for n, s in models.big_shapes(0.1, layers=60).items() if n.startswith("model.layers.0.")}
    shapes = {n.replace(".0.", f".{number}."): s for number in range(60) for n, s in layer.items()}
    base = models.base(work / "base", shapes=shapes, dtype=torch.bfloat16)
    making.init(base, work / "state", making.Recipe(rule="mean"))
    config = (base / "config.json").read_bytes()
    same = {name: ("BF16", shape) for name, shape in shapes.items()}
    first = next(iter(same))
    wrong = {name.replace("layers", "blocks"): row for name, row in same.items()}
    shards = {
        f"model-{n + 1:05d}-of-00060.safetensors": {k: v for k, v in wrong.items() if f".{n}." in k} for n in range(60)
    }
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    single = "model.safetensors"
    factors = {
        f"base_model.model.h.{n}.attn.lora_{x}.weight": ("F32", (64, 512) if x == "A" else (512, 64))
        for n in range(24)
        for x in "AB"
    }
    adapter = {
        "peft_type": "LORA",
        "r": 64,
        "lora_alpha": 64,
        "target_modules": ["attn"],
        "base_model_name_or_path": "other/base",
    }
    cases: dict[str, Callable[[], Mapping[str, bytes]]] = {
        "wrong shape": lambda: {single: raw(same | {first: ("BF16", (8, 8))})},
        "wrong dtype": lambda: {single: raw(same | {first: ("I32", shapes[first])})},
        "adapter of another base": lambda: {
            "adapter_model.safetensors": raw(factors),
            "adapter_config.json": json.dumps(adapter).encode(),
        },
        "pickle only": lambda: {"pytorch_model.bin": bytes(20_000_000)},
        "60 shards of another base": lambda: (
            {name: raw(part) for name, part in shards.items()}
            | {"model.safetensors.index.json": json.dumps(index).encode()}
        ),
        "20,000 names": lambda: {
            single: raw({f"model.layers.{n}.mlp.experts.down.weight": ("BF16", (64,)) for n in range(20_000)})
        },
        "100,000 names": lambda: {
            single: raw({f"model.layers.{n}.mlp.experts.down.weight": ("BF16", (64,)) for n in range(100_000)})
        },
    }
    with merge(work / "state", hub) as ours:
        for number, (name, files) in enumerate(cases.items()):
            repo, made = f"no/n{number}", files()
            hub.commit(repo, {**made, "config.json": config, "README.md": card(BASE)})
            hub.journal.clear()
            begun = time.perf_counter()
            outcome = ours.fold(f"hf://{repo}")
            seconds = time.perf_counter() - begun
            assert outcome.fate == "refused", outcome
            total, header = (
                hub.journal.sent(origin=""),
                sum(int.from_bytes(f[:8], "little") for n, f in made.items() if n.endswith(".safetensors")),
            )
            print(
                f"{name:26} {total / 1e3:9.1f} kB ({hub.journal.sent(origin='api') / 1e3:.1f} of the API; "
                f"headers {header / 1e3:.1f} kB, "
                f"files {sum(map(len, made.values())) / MB:.1f} MB), {len(hub.journal)} requests, "
                f"{seconds:.2f} s: {outcome.reason}" + ("" if total < 1e6 else "  MORE THAN 1 MB"),
                flush=True,
            )
