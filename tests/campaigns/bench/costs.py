"""What merges cost, beside mergekit's own command on the same models: from zero, and when one more model comes.

    python -m tests.campaigns.bench.costs [--env DIR] [--gigabytes 1] [--rules linear task-arithmetic ties]
        [--counts 1 2 4 8] [--turns 3] [--log FILE] [--wide]

A bf16 model of the shapes of a Llama, and as many fine-tunes. Each turn goes, for each rule, through init and one fold
after another; at each count it exports, has mergekit merge as many, and reads and writes the bytes that any merge has
to (`copy`: base and fine-tunes read, one model written and synced). Every command is a process of its own; both sides
have one thread. CPU seconds and seconds are medians of the turns, beyond imports, which are told apart; memory is
VmHWM. mergekit is as in `tests.campaigns.bench.peers`, in the environment that this makes; it computes in bfloat16, as
its examples have it, or with `--wide` in float32 and rounds once, as continual does.

`--log` keeps each figure as a line of JSON: a later run with the same file adds its turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from tests.campaigns.bench import ran
from tests.campaigns.bench.peers import PINS, environment
from tests.helpers import models

RULES: Mapping[str, tuple[list[str], str, Mapping[str, float]]] = {
    "linear": (["mean"], "linear", {"weight": 1.0}),
    "task-arithmetic": (["task-arithmetic", "--scale", "0.3"], "task_arithmetic", {"weight": 0.3}),
    "ties": (
        ["ties", "-o", "density=0.2", "-o", "trim=tensor", "--scale", "1"],
        "ties",
        {"weight": 1.0, "density": 0.2},
    ),
}
"""By mergekit's name: the words of `init`, its method and what each model has. Both trim within a tensor."""
ROUNDING = 0.01
"""How far the weights of both may lie apart, relative to their norm: two that round to bfloat16, and mergekit's sums in
it."""
MERGEKIT = (
    ran.MEASURE
    + """
import torch, transformers
from mergekit.scripts.run_yaml import main
began = time.process_time(), time.perf_counter()
main(standalone_mode=False)
told(*began)
"""
)
COPY = (
    ran.MEASURE
    + """
from pathlib import Path
from tests.campaigns.bench.fold import synced_copy
began = time.process_time(), time.perf_counter()
synced_copy([Path(word) for word in sys.argv[3:]], Path(sys.argv[1]), int(sys.argv[2]))
told(*began)
"""
)


class Figure(NamedTuple):
    """A command that was measured: of which rule, what it was, with how many models in the end."""

    gigabytes: float
    rule: str
    what: str
    models: int
    cost: ran.Cost


class World(NamedTuple):
    """A base and its fine-tunes, the python that has mergekit, where to work and where figures go."""

    base: Path
    tuned: list[Path]
    mergekit: Path
    work: Path
    log: Path
    gigabytes: float
    wide: bool

    def note(self, rule: str, what: str, count: int, cost: ran.Cost) -> None:
        """Appends a figure to the log."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps([self.gigabytes, rule, what, count, cost]) + "\n")
        said = f"{cost.cpu:.2f} CPU s, {cost.wall:.1f} s, {cost.memory / 1e6:.0f} MB"
        sys.stderr.write(f"{rule}, {what} {count}: {said}\n")


def world(work: Path, args: argparse.Namespace, python: Path) -> World:
    """Makes the models."""
    shapes = models.big_shapes(args.gigabytes, layers=args.layers)
    words, width = shapes["model.embed_tokens.weight"]
    wide = shapes["model.layers.0.mlp.up_proj.weight"][0]
    base = models.base(work / "base", shapes=shapes, dtype=torch.bfloat16)
    sizes = {"hidden_size": width, "intermediate_size": wide, "vocab_size": words, "num_hidden_layers": args.layers}
    config = {**models.CONFIG, **sizes, "num_attention_heads": width // 16, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tuned = [models.fine_tune(base, work / f"tuned-{n}", n) for n in range(max(args.counts))]
    log = args.log or work / "log.jsonl"
    return World(base, tuned, python, work, log, args.gigabytes, args.wide)


def mergekit(world: World, rule: str, count: int) -> ran.Cost:
    """Merges the first `count` fine-tunes by mergekit's command; what came out has to be what `export` has."""
    _, method, parameters = RULES[rule]
    given: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": parameters} for model in world.tuned[:count]],
        "dtype": "float32" if world.wide else "bfloat16",
        "out_dtype": "bfloat16",
    }
    if method != "linear":
        given["base_model"] = str(world.base)
    config, target = world.work / "config.yaml", world.work / "merged"
    config.write_text(json.dumps(given))  # JSON is YAML
    words = (str(config), str(target), "--no-copy-tokenizer", "--quiet")
    cost = ran.python(MERGEKIT, *words, by=str(world.mergekit), env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    theirs, ours = (load_file(where / "model.safetensors") for where in (one_file(target), world.work / "export"))
    apart = max(float((theirs[n].float() - t.float()).norm() / t.float().norm()) for n, t in ours.items())
    assert apart <= ROUNDING, (rule, count, apart)
    shutil.rmtree(target)
    return cost


def one_file(directory: Path) -> Path:
    """The directory, its only weight file under the name that one file alone has."""
    (found,) = directory.glob("*.safetensors")
    found.rename(directory / "model.safetensors")
    return directory


def turn(world: World, rule: str, counts: list[int]) -> None:
    """One turn of one rule."""
    state, target = str(world.work / "state"), world.work / "export"
    note = functools.partial(world.note, rule)
    one = ("--workers", "1", "--state", state)
    size = (world.base / "model.safetensors").stat().st_size
    note("init", 0, ran.continual("init", str(world.base), "--rule", *RULES[rule][0], "--state", state))
    for number, model in enumerate(world.tuned[: max(counts)], 1):
        note("fold", number, ran.continual("fold", str(model), "--keep", "1", *one))
        if number in counts:
            note("export", number, ran.continual("export", str(target), *one))
            note("mergekit", number, mergekit(world, rule, number))
            shutil.rmtree(target)
            read = [str(model / "model.safetensors") for model in (world.base, *world.tuned[:number])]
            note("copy", number, ran.python(COPY, str(world.work / "copied"), str(size), *read))
            shutil.rmtree(world.work / "copied")
    shutil.rmtree(state)


def figures(log: Path) -> list[Figure]:
    """Everything in a log."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [Figure(size, rule, what, count, ran.Cost(*cost)) for size, rule, what, count, cost in rows]


def table(found: list[Figure]) -> None:
    """Prints the medians, as Markdown: a row for each rule and count, CPU seconds and seconds beside each other."""

    def median(size: float, rule: str, what: str, count: int) -> ran.Cost:
        costs = [f.cost for f in found if f[:4] == (size, rule, what, count)]
        return ran.Cost(*(statistics.median(column) for column in zip(*costs, strict=True)))

    imports: dict[str, list[float]] = {}
    for one in found:
        side = "mergekit" if one.what == "mergekit" else "continual"
        imports.setdefault(side, []).append(one.cost.whole - one.cost.cpu)
    said = ", ".join(f"{side} {statistics.median(cpu):.1f}" for side, cpu in imports.items())
    print(f"imports, CPU s a command: {said}")
    print(
        "| GB | rule | n | init + n folds + export | mergekit | ratio | n-th fold | and export | mergekit / fold | "
        "mergekit / both | copy | MB: fold, export, mergekit |"
    )
    print("|" + "---|" * 12)
    for size, rule, count in dict.fromkeys((f.gigabytes, f.rule, f.models) for f in found if f.what == "export"):
        of = functools.partial(median, size, rule)
        fold, export, theirs, copy = (of(what, count) for what in ("fold", "export", "mergekit", "copy"))
        folds = [of("fold", number) for number in range(1, count + 1)]
        parts = [of("init", 0), *folds, export]
        cpu, wall = sum(part.cpu for part in parts), sum(part.wall for part in parts)
        print(
            f"| {size:g} | {rule} | {count} | {cpu:.1f} ({wall:.0f}) | {theirs.cpu:.1f} ({theirs.wall:.0f}) | "
            f"{cpu / theirs.cpu:.2f} | {fold.cpu:.1f} ({fold.wall:.1f}) | {export.cpu:.1f} ({export.wall:.1f}) | "
            f"{theirs.cpu / fold.cpu:.1f} | {theirs.cpu / (fold.cpu + export.cpu):.1f} | "
            f"{copy.cpu:.1f} ({copy.wall:.0f}) | {fold.memory / 1e6:.0f}, {export.memory / 1e6:.0f}, "
            f"{theirs.memory / 1e6:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--env", type=Path, default=cache / "continual/peers", help="where the environments are")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=list(RULES))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="how many models are merged")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--log", type=Path, help="where figures are kept; a later run adds to them")
    parser.add_argument("--wide", action="store_true", help="mergekit computes in float32")
    args = parser.parse_args()
    python = environment(args.env / "mergekit", PINS["mergekit"])
    with tempfile.TemporaryDirectory() as work:
        made = world(Path(work), args, python)
        size = (made.base / "model.safetensors").stat().st_size
        print(f"a model of {size / 1e9:.2f} GB; medians of the turns in the log; {', '.join(PINS['mergekit'])}")
        for _ in range(args.turns):
            for rule in args.rules:
                turn(made, rule, args.counts)
        table(figures(made.log))


if __name__ == "__main__":
    main()
