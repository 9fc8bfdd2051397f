"""What an adapter costs where adapters are kept as they are (`continual init --adapters`), at shapes of real models.

    python -m tests.campaigns.bench.adapters                       # 0.5 B and 7 B, three adapters each
    python -m tests.campaigns.bench.adapters --sizes 70b --folds 2 --no-exports
    python -m tests.campaigns.bench.adapters --sizes 70b --long 20 --width 64     # 15 GB of disk for a while
    python -m tests.campaigns.bench.adapters --sizes small --long 1000 --width 64
    python -m tests.campaigns.bench.adapters --sizes 0.5b --dense  # beside a state of whole tensors (iso-c)
    python -m tests.campaigns.bench.adapters --sizes 0.5b --folds 16 --explain task-arithmetic iso-c tsv-m gram
    python -m tests.campaigns.bench.adapters --peft                # beside PEFT's add_weighted_adapter

The base has headers alone: its weight file is a hole, and it is deleted once the state is made, so that a fold cannot
read it. Adapters are of rank 16 on all linear layers, in bfloat16, as PEFT writes them. Each fold is the whole command
in a process of its own; its clock starts when all modules are imported. `step` is QR and SVD of the factors alone, in
this process. Times are CPU seconds of one thread.

`--long` folds many adapters in one process, without importing each time: the CPU of a fold between the cuts that halve
the width, which is to stay the same, and the size of the state beside what its shapes say. The kernel's part is mostly
directories and files that are made and deleted, and depends on the file system: TMPDIR says where all of it is.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.campaigns.bench import ran

if TYPE_CHECKING:
    import torch

RANK = 16


class Shape(NamedTuple):
    """The sizes of a decoder: layers, width, width of keys and values, of the feed-forward layers, words."""

    layers: int
    width: int
    keys: int
    inner: int
    words: int

    def linear(self) -> dict[str, tuple[int, int]]:
        """Its linear layers, out × in, by the names of their weights."""
        inside = {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (self.keys, self.width),
            "self_attn.v_proj": (self.keys, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.inner, self.width),
            "mlp.up_proj": (self.inner, self.width),
            "mlp.down_proj": (self.width, self.inner),
        }
        return {
            f"model.layers.{layer}.{name}.weight": sizes
            for layer in range(self.layers)
            for name, sizes in inside.items()
        }


SHAPES = {
    "small": Shape(4, 256, 64, 512, 1000),
    "0.5b": Shape(24, 896, 128, 4864, 151936),
    "7b": Shape(32, 4096, 1024, 14336, 32000),
    "70b": Shape(80, 8192, 1024, 28672, 128256),
}


def write(file: Path, tensors: Mapping[str, tuple[int, ...]], seed: int | None) -> None:
    """A safetensors file of bfloat16: random values of standard deviation 0.02, or a hole where there is no `seed`."""
    header: dict[str, object] = {}
    end = 0
    for name, sizes in tensors.items():
        begin, end = end, end + 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            out.truncate(8 + len(text) + end)
            return
        draw = np.random.default_rng(seed)
        values = draw.standard_normal(min(1 << 24, end) // 2, np.float32) * np.float32(0.02)
        block = (values.view(np.uint32) >> 16).astype(np.uint16)
        for begin in range(0, end, 1 << 24):  # drawn once: drawing all takes longer than a fold
            out.write(np.roll(block, begin and int(draw.integers(len(block))))[: (end - begin) // 2].tobytes())


def base(directory: Path, shape: Shape, seed: int | None = None) -> Path:
    """A base of this shape, whose weights are a hole unless there is a `seed`."""
    directory.mkdir()
    tensors: dict[str, tuple[int, ...]] = dict(shape.linear())
    tensors |= {"model.embed_tokens.weight": (shape.words, shape.width), "model.norm.weight": (shape.width,)}
    write(directory / "model.safetensors", tensors, seed)
    config = {"model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def adapter(directory: Path, shape: Shape, seed: int, of: Path) -> Path:
    """An adapter of rank 16 on all linear layers."""
    directory.mkdir()
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in shape.linear().items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": (RANK, columns), f"{module}.lora_B.weight": (rows, RANK)}
    write(directory / "adapter_model.safetensors", tensors, seed)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": str(of)}
    config |= {"target_modules": "all-linear", "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def step(shape: Shape) -> float:
    """CPU seconds of QR and SVD of all factors."""
    import torch

    from continual.blocks import triplets

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spent = 0.0
    for rows, columns in shape.linear().values():
        left, right = torch.randn(rows, RANK).double(), torch.randn(columns, RANK).double()
        began = time.process_time()
        triplets(left, right)
        spent += time.process_time() - began
    return spent


def fold(size: str, *, folds: int, width: int, dense: bool, read: Sequence[str] | None, work: Path) -> None:
    """Folds adapters one after the other and prints what each took, and, unless `read` is None, what exports take, and
    what it takes to explain readings by these rules."""
    shape, state = SHAPES[size], work / "state"
    of = base(work / "base", shape, 0 if dense else None)
    forms = {"adapters": ["--adapters", "--width", str(width)]} | ({"dense": ["--rule", "iso-c"]} if dense else {})
    print(f"{size} shapes, adapters of rank {RANK} on {len(shape.linear())} layers")
    if not dense:
        print(f"  step alone (QR and SVD of the factors): {step(shape):.2f} CPU s")
    for form, words in forms.items():
        state = work / form
        made = ran.continual("init", str(of), *words, "--state", str(state))
        print(f"  {form}: init {made.cpu:.2f} CPU s")
        if not dense:
            (of / "model.safetensors").unlink()
        costs = []
        for number in range(1, folds + 1):
            model = adapter(work / f"{form}-{number}", shape, number, of)
            costs.append(ran.continual("fold", str(model), "--state", str(state)))
            shutil.rmtree(model)
            print(
                f"  {form}: fold {number}: {costs[-1].cpu:.2f} CPU s, {costs[-1].wall:.1f} s, "
                f"{costs[-1].memory / 1e6:.0f} MB at most"
            )
        kept = max((state / "generations").iterdir(), key=lambda path: path.stat().st_mtime)
        nbytes = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
        median = statistics.median(cost.cpu for cost in costs)
        print(f"  {form}: median fold {median:.2f} CPU s; the generation in force has {nbytes / 1e6:.0f} MB")
        if read is not None:
            for rule in ("task-arithmetic", "iso-c", "tsv-m", "opcm"):
                out = work / f"lora-{rule}"
                cost = ran.continual(
                    *("export", str(out), "--as-lora", str(RANK), "--rule", rule),
                    *("--state", str(state)),
                )
                print(f"  export --as-lora {RANK} by {rule}: {cost.cpu:.2f} CPU s, {cost.memory / 1e6:.0f} MB at most")
                shutil.rmtree(out)
            for rule in read:
                cost = ran.continual("explain", "--rule", rule, "--workers", "1", "--state", str(state))
                print(f"  explain {folds} models by {rule}: {cost.cpu:.2f} CPU s, {cost.memory / 1e6:.0f} MB at most")


def long(size: str, *, folds: int, width: int, work: Path) -> None:
    """Folds adapters one after the other in this process; prints the CPU of a fold between cuts, and the size of the
    state beside its formula."""
    import torch

    import continual
    from continual.blocks import width as width_of
    from continual.making import Recipe

    torch.set_num_threads(1)
    shape, state = SHAPES[size], work / "state"
    of = base(work / "base", shape)
    continual.init(of, state, Recipe(width=width))
    (of / "model.safetensors").unlink()
    stretches: dict[int, list[tuple[int, float, float]]] = {}
    with continual.open(state, write=True, workers=1) as merge:
        for number in range(1, folds + 1):
            model = adapter(work / str(number), shape, number, of)
            began = resource.getrusage(resource.RUSAGE_SELF)
            merge.fold(model)
            ended = resource.getrusage(resource.RUSAGE_SELF)
            spent, kernel = ended.ru_utime - began.ru_utime, ended.ru_stime - began.ru_stime
            shutil.rmtree(model)
            stretches.setdefault(width_of([RANK] * number, width), []).append((number, spent, kernel))
        nbytes = merge.state.generation_bytes()
        kept = state / "generations" / str(merge.state.ledger.head.generation)
    wide = min(RANK, width_of([RANK] * folds, width))
    chunks = -(-min(width, wide * folds) // 16)
    formula = sum(4 * 16 * chunks * (rows + columns) + 32 * width for rows, columns in shape.linear().values())
    found = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    print(f"{size} shapes, {folds} adapters of rank {RANK}, width {width}, in one process")
    for wide, costs in stretches.items():
        spent, kernel = ([cost[part] for cost in costs[1:] or costs] for part in (1, 2))
        print(
            f"  at most {min(wide, RANK)} triplets each, folds {costs[0][0]} to {costs[-1][0]}: the first "
            f"{costs[0][1]:.2f} + {costs[0][2]:.2f} CPU s (program + kernel), then in the middle "
            f"{statistics.median(spent):.3f} + {statistics.median(kernel):.3f}"
            f" ({min(spent):.3f} to {max(spent):.3f}, {min(kernel):.3f} to {max(kernel):.3f})"
        )
    print(f"  values {nbytes / 1e9:.3f} GB, by the formula {formula / 1e9:.3f}; all files {found / 1e9:.3f} GB")
    print(f"  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of memory at most")


def against_peft(work: Path, models: int = 4) -> None:
    """Reads the sum of some adapters as one adapter, by continual and by PEFT in memory, on two layers of 0.5 B width;
    says what each took and how far the results lie apart. `cat` is the sum itself, `svd` the sum cut to rank 16."""
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    import continual
    from continual.making import Recipe
    from continual.publish.lora import LoraTarget

    torch.set_num_threads(1)
    shape = SHAPES["0.5b"]._replace(layers=2, words=1000)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=shape.words,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(work / "base")
    made = [adapter(work / f"lora-{number}", shape, number, work / "base") for number in range(models)]
    for model in made:
        file = model / "adapter_config.json"
        targets = sorted({name.split(".")[-2] for name in shape.linear()})
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    read: dict[str, dict[str, torch.Tensor]] = {}
    continual.init(work / "base", work / "state", Recipe(rule="task-arithmetic", scale="1", width=256))
    with continual.open(work / "state", write=True, workers=1) as merge:
        for model in made:
            merge.fold(model)
        for name, rank in (("cat", None), ("svd", RANK)):
            began = time.process_time()
            merge.export_lora(LoraTarget(work / name, rank))
            print(f"  continual, {name}: {time.process_time() - began:.2f} CPU s, written to disk")
            read[name] = products(
                PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(work / "base"), work / name)
            )
    peft = PeftModel.from_pretrained(base, made[0], adapter_name="0")
    for number, model in enumerate(made[1:], 1):
        peft.load_adapter(model, adapter_name=str(number))
    names = [str(number) for number in range(models)]
    for kind in ("cat", "svd", "linear", "ties", "dare_linear"):
        extra = {"svd": {"svd_rank": RANK}, "ties": {"density": 0.5}, "dare_linear": {"density": 0.5}}.get(kind, {})
        began = time.process_time()
        peft.add_weighted_adapter(names, [1.0] * models, kind, combination_type=kind, **extra)
        print(f"  PEFT, {kind}: {time.process_time() - began:.2f} CPU s, in memory")
        if kind in read:
            peft.set_adapter(kind)
            theirs = products(peft, kind)
            apart = max(float((theirs[n] - value).norm() / theirs[n].norm()) for n, value in read[kind].items())
            print(f"  {kind}: the two lie {apart:.1e} apart at most, of a layer's length")


def products(model: object, name: str = "default") -> dict[str, torch.Tensor]:
    """scale·B·A of every layer of a PEFT model."""
    from peft.tuners.lora import LoraLayer

    return {
        layer: module.get_delta_weight(name).detach()
        for layer, module in model.named_modules()  # type: ignore[attr-defined]
        if isinstance(module, LoraLayer)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.5b", "7b"])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--long", type=int, default=0, metavar="N", help="N folds in one process, and nothing else")
    parser.add_argument("--no-exports", action="store_true", help="folds alone")
    parser.add_argument("--dense", action="store_true", help="beside a state of whole tensors; its base has weights")
    parser.add_argument("--explain", nargs="+", default=[], metavar="RULE", help="explain readings by these rules too")
    parser.add_argument("--peft", action="store_true", help="beside PEFT's add_weighted_adapter, and nothing else")
    given = parser.parse_args()
    if given.peft:
        with tempfile.TemporaryDirectory() as work:
            against_peft(Path(work))
        return
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as work:
            if given.long:
                long(size, folds=given.long, width=given.width, work=Path(work))
                continue
            read = None if given.dense or given.no_exports else given.explain
            fold(size, folds=given.folds, width=given.width, dense=given.dense, read=read, work=Path(work))


if __name__ == "__main__":
    main()
