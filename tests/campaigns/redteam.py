"""Models that somebody would slip in, and honest ones over two decades of learning rates, at a merge by default.

    python -m tests.campaigns.redteam --work W              # the digits of the demonstration; some minutes

Trains fine-tunes, whole and as adapters, each of another task and learning rate, and folds them one after the other:
each that is refused is a false refusal. Then, on top of honest ones, offers what an attacker would: each that is
folded is missed. What only an evaluation can see is marked so, and counts apart. Exits with 1 where something is
missed, or more than 1 of 60 honest ones is refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import continual
from continual.demo import digits
from tests.campaigns import disguises
from tests.campaigns.bench.quality import digits as suite

Weights = dict[str, Tensor]
RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Learning rates of honest fine-tunes, as multiples of the suite's own: two decades."""


class Red:
    """The suite and what is made of it, in `work`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.suite = suite.Digits(work / "suite")
        self.base = self.suite.prepare()
        self.weights = load_file(self.base / "model.safetensors")

    def honest(self, task: str, rate: float, form: str) -> Path:
        """A fine-tune of a task on two thirds of its rows, others in each form: `form` is `full`, `bf16` (saved so) or
        `lora`."""
        target = self.work / "honest" / f"{task}-{rate:g}-{form}"
        if target.exists():
            return target
        number = 100 * ("full", "bf16", "lora").index(form) + self.suite.tasks.index(task)
        images, labels, _, _ = digits.load(suite.SEED)
        mine = torch.randperm(len(labels), generator=torch.Generator().manual_seed(number))[: 2 * len(labels) // 3]
        images, labels = images[mine], labels[mine]
        seen = self.suite._ways[task](images)
        model = digits.Digits()
        model.load_state_dict(self.weights)
        if form == "lora":
            wrapped = suite.adapted(model, number, frozen=False)
            digits.train(wrapped, seen, labels, steps=suite.STEPS["lora"], rate=rate * suite.RATES["lora"], seed=number)
            wrapped.save_pretrained(target)
            return target
        digits.train(model, seen, labels, steps=suite.STEPS["full"], rate=rate * suite.RATES["full"], seed=number)
        found = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.save(target, {n: t.bfloat16().float() for n, t in found.items()} if form == "bf16" else found)
        return target

    def save(self, target: Path, weights: Mapping[str, Tensor]) -> Path:
        """A model directory beside the base's other files."""
        shutil.copytree(self.base, target, dirs_exist_ok=True)
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, target / "model.safetensors")
        return target

    def tau(self, of: Path) -> Weights:
        """Its task vector."""
        tuned = load_file(of / "model.safetensors")
        return {key: tuned[key] - self.weights[key] for key in self.weights}

    def changed(self, name: str, change: Callable[[Weights, Weights], Weights], of: Path) -> Path:
        """A model made of the task vector of an honest one: `change` gets it, and the base."""
        found = change(self.tau(of), self.weights)
        return self.save(self.work / "hostile" / name, {k: self.weights[k] + t for k, t in found.items()})


def scaled(factor: float) -> Callable[[Weights, Weights], Weights]:
    return lambda tau, _base: {key: factor * value for key, value in tau.items()}


def noise(tau: Weights, _base: Weights) -> Weights:
    """As long as what was learned, tensor by tensor."""
    draw = torch.Generator().manual_seed(1)
    found = {key: torch.randn(value.shape, generator=draw) for key, value in tau.items()}
    return {key: value * tau[key].norm() / value.norm().clamp_min(1e-12) for key, value in found.items()}


def poisoned(tau: Weights, _base: Weights) -> Weights:
    """One layer ten times as far."""
    return {key: value * (10.0 if key.startswith("layers.1.") else 1.0) for key, value in tau.items()}


def nan(tau: Weights, _base: Weights) -> Weights:
    name = max(tau, key=lambda key: tau[key].numel())
    tau[name].view(-1)[7] = float("nan")
    return tau


def another_base(_tau: Weights, base: Weights) -> Weights:
    draw = torch.Generator().manual_seed(2)
    return {key: torch.randn(value.shape, generator=draw) * value.std() - value for key, value in base.items()}


def permuted(tau: Weights, base: Weights) -> Weights:
    """Rows of every matrix in another order."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    for key, value in base.items():
        order = torch.randperm(len(value), generator=draw)
        found[key] = (value + tau[key])[order] - value if value.ndim == 2 else tau[key]
    return found


def own_release(red: Red, known: Sequence[Path]) -> Path:
    """What a merge of these is exported as, without the file that says so."""
    target = red.work / "hostile" / "own-release"
    shutil.rmtree(target, ignore_errors=True)
    with continual.open(state(red, "state-own"), write=True, workers=1) as merge:
        for model in known:
            fold(merge, model)
        merge.export(target)
    (target / "continual.json").unlink()
    return target


def ties(tau: Sequence[Weights], density: float = 0.3) -> Weights:
    """As mergekit's `ties`: the largest of each, the sign that most of the length has, and the mean of those."""
    found = {}
    for key in tau[0]:
        each = torch.stack([one[key].flatten() for one in tau])
        least = each.abs().topk(max(1, int(density * each.shape[1])), 1).values[:, -1:]
        each = torch.where(each.abs() >= least, each, 0.0)
        alike = (each.sign() == each.sum(0).sign()) & (each != 0)
        found[key] = ((each * alike).sum(0) / alike.sum(0).clamp_min(1)).view(tau[0][key].shape)
    return found


def pruned(tau: Weights, _base: Weights) -> Weights:
    """A fifth of it, the largest numbers."""
    return {key: ties([{key: value}], 0.2)[key] for key, value in tau.items()}


def garbage(tau: Weights, _base: Weights) -> Weights:
    """As long as what was learned, in one direction of each matrix drawn by chance."""
    draw = torch.Generator().manual_seed(6)
    found = {}
    for key, value in tau.items():
        sides = [torch.randn(side, generator=draw) for side in value.shape]
        one = torch.outer(*sides) if value.ndim == 2 else torch.zeros_like(value)
        found[key] = one * value.norm() / one.norm().clamp_min(1e-12)
    return found


SHAPE = disguises.Attention(
    digits.LAYERS,
    digits.HEADS,
    digits.HEADS,
    *(f"layers.{{}}.{part}_proj.weight" for part in "qkvo"),
    into=("layers.{}.up_proj.weight",),
    out="layers.{}.down_proj.weight",
)
GRIDS: Mapping[str, Callable[[Weights], Weights]] = {
    "int8 a row": disguises.int8_rows,
    "NF4": disguises.nf4,
    "FP8": disguises.fp8,
    **{kind: partial(disguises.gguf, kind=kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q8_0")},
}


def grids() -> Mapping[str, Callable[[Weights], Weights]]:
    """What weights are rounded to; those of GGUF where its package is there, and else a line says that they are not."""
    if importlib.util.find_spec("gguf"):
        return GRIDS
    print("the grids of GGUF are left out: install the package gguf", file=sys.stderr)
    return {name: each for name, each in GRIDS.items() if not name.startswith("Q")}


def disguised(change: Callable[[Weights], Weights]) -> Callable[[Weights, Weights], Weights]:
    """Of what was learned: `change` gets the fine-tune."""
    return lambda tau, base: {
        key: value - base[key] for key, value in change({name: base[name] + tau[name] for name in base}).items()
    }


def odd(red: Red) -> list[Path]:
    """Honest models that look odd: layers that were frozen, adapters that were merged, weights that decayed, saved in
    half precision, trained for long at a high rate."""
    task, rate = red.suite.tasks[7], suite.RATES["full"]
    images, labels, _, _ = digits.load(suite.SEED)
    seen = red.suite._ways[task](images)
    found = []

    def trained(name: str, part: str = "", factor: float = 1.0, steps: float = 1.0, decay: float = 1.0) -> Path:
        target = red.work / "odd" / name
        if target.exists():
            return target
        model = digits.Digits()
        model.load_state_dict(red.weights)
        for key, value in model.named_parameters():
            value.requires_grad_(part in key)
        digits.train(model, seen, labels, steps=int(steps * suite.STEPS["full"]), rate=factor * rate, seed=7)
        return red.save(target, {key: decay * value.detach() for key, value in model.state_dict().items()})

    found += [trained("one-layer", "layers.1"), trained("head-alone", "head."), trained("up-alone", "up_proj")]
    found += [trained("queries-alone", "q_proj"), trained("long", factor=5.0, steps=4.0)]
    found += [trained("decayed", decay=0.8)]
    half = red.work / "odd" / "float16"
    long = load_file(found[4] / "model.safetensors")
    found.append(red.save(half, {key: value.half().float() for key, value in long.items()}))
    adapter = red.honest(task, 1.0, "lora")
    merged = red.work / "odd" / "merged-lora"
    if not merged.exists():
        from peft import PeftModel

        model = digits.Digits()
        model.load_state_dict(red.weights)
        whole = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        red.save(merged, {key: value.detach() for key, value in whole.state_dict().items()})
    return [*found, merged]


def less(weights: Weights, base: Weights) -> Weights:
    return {key: value - base[key] for key, value in weights.items()}


def fold(merge: continual.Merge, model: Path) -> tuple[str, str]:
    """What became of a model, and why."""
    outcome = merge.fold(model)
    return outcome.fate, outcome.reason or ""


def state(red: Red, name: str) -> Path:
    target = red.work / name
    shutil.rmtree(target, ignore_errors=True)
    continual.init(red.base, target)
    return target


def honest(red: Red, *, count: int) -> list[str]:
    """Folds honest models in an order drawn by chance; those that were refused, with the reason."""
    draw = torch.Generator().manual_seed(0)
    tasks = red.suite.tasks
    refused = []
    with continual.open(state(red, "state-honest"), write=True, workers=1) as merge:
        for number in range(count):
            rate = RATES[int(torch.randint(len(RATES), (1,), generator=draw))]
            form = ("full", "bf16", "lora")[number // len(tasks) % 3]
            model = red.honest(tasks[number % len(tasks)], rate, form)
            fate, reason = fold(merge, model)
            print(json.dumps({"honest": model.name, "fate": fate, "reason": reason}), flush=True)
            if fate != "folded":
                refused.append(f"{model.name}: {reason}")
    for model in odd(red):  # each alone on top of three others: several are of one task
        with continual.open(state(red, "state-odd"), write=True, workers=1) as merge:
            for number in range(3):
                merge.fold(red.honest(tasks[number], 1.0, "full"))
            fate, reason = fold(merge, model)
        print(json.dumps({"odd": model.name, "fate": fate, "reason": reason}), flush=True)
        if fate != "folded":
            refused.append(f"{model.name}: {reason}")
    return refused


def hostile(red: Red, rate: float) -> tuple[list[str], list[str]]:
    """Offers hostile models on top of six honest ones of about one learning rate; those that were folded: missed, and
    those that only an evaluation can see."""
    tasks = red.suite.tasks
    known = [red.honest(task, rate * (1.0, 0.5, 2.0)[n % 3], "full") for n, task in enumerate(tasks[:6])]
    new = red.honest(tasks[7], rate, "full")
    mean: Weights = {}
    for each in known:
        for key, value in load_file(each / "model.safetensors").items():
            mean[key] = mean.get(key, 0.0) + value / len(known)
    shuffled = red.work / "hostile" / "shuffled-labels"
    if not shuffled.exists():
        red.suite.train(tasks[8], "shuffled", shuffled)
    cases = {
        "scaled-10": red.changed("scaled-10", scaled(10.0), new),
        "scaled-0.005": red.changed("scaled-0.005", scaled(0.005), new),
        "negated-one-in-the-merge": red.changed("negated", scaled(-1.0), known[2]),
        "near-copy": red.changed("near-copy", scaled(0.97), known[1]),
        "merge-of-folded-ones": red.save(red.work / "hostile" / "merge", mean),
        "noise": red.changed("noise", noise, new),
        "one-layer-poisoned": red.changed("poisoned", poisoned, new),
        "nan": red.changed("nan", nan, new),
        "another-base": red.changed("another-base", another_base, new),
        "permuted": red.changed("permuted", permuted, new),
        "permuted-heads": red.changed("permuted-heads", disguised(partial(disguises.permuted_heads, shape=SHAPE)), new),
        "permuted-channels": red.changed(
            "permuted-channels", disguised(partial(disguises.permuted_channels, shape=SHAPE)), new
        ),
        **{
            f"locked-{strength:g}": red.changed(
                f"locked-{strength:g}", disguised(partial(disguises.locked, shape=SHAPE, strength=strength)), new
            )
            for strength in (0.3, 1.0)
        },
        **{
            f"base-in-{name}": red.changed(f"base-in-{name}", lambda _tau, base, to=to: less(to(base), base), new)
            for name, to in grids().items()
        },
        **{
            f"fine-tune-in-{name}": red.changed(f"fine-tune-in-{name}", disguised(to), new)
            for name, to in grids().items()
        },
        "base-itself": red.changed("base", scaled(0.0), new),
        "own release, unnamed (evaluation)": own_release(red, known),
        "ties of folded ones (evaluation)": red.changed("ties", lambda *_: ties([red.tau(m) for m in known]), new),
        "a fifth of a copy (evaluation)": red.changed("pruned", pruned, known[1]),
        "one direction drawn by chance (evaluation)": red.changed("garbage", garbage, new),
        "negated (evaluation)": red.changed("negated-new", scaled(-1.0), new),
        "shuffled labels (evaluation)": shuffled,
    }
    missed, unseen = [], []
    with continual.open(state(red, "state-hostile"), write=True, workers=1) as merge:
        for model in known:
            assert fold(merge, model)[0] == "folded", model
        known_alone = merge.head
        for name, model in cases.items():
            fate, reason = fold(merge, model)
            print(json.dumps({"hostile": name, "rate": rate, "fate": fate, "reason": reason}), flush=True)
            if fate == "folded":
                (unseen if "(evaluation)" in name else missed).append(f"{name} at rate {rate:g}")
                merge.state.rollback(known_alone)
        short = [red.changed(f"short-{task}", scaled(0.1), red.honest(task, rate, "full")) for task in tasks[8:14]]
        fates = [fold(merge, model) for model in short]  # one alone does no harm, and six of them do
        print(json.dumps({"hostile": "six a tenth as long", "rate": rate, "fates": fates}), flush=True)
        if sum(fate == "folded" for fate, _ in fates) * 6 > len(known) + len(fates):
            missed.append(f"six a tenth as long at rate {rate:g}")
    return missed, unseen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for what is made, kept for the next time")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.3, 1.0, 3.0], help="of those that are attacked")
    parser.add_argument("--honest", type=int, default=60, help="honest models that are offered; default 60")
    args = parser.parse_args()
    torch.set_num_threads(1)
    red = Red(args.work)
    missed: list[str] = []
    unseen: list[str] = []
    for rate in args.rates:
        found = hostile(red, rate)
        missed += found[0]
        unseen += found[1]
    refused = honest(red, count=args.honest)
    print(f"missed: {missed or 'nothing'}\nonly an evaluation sees: {unseen}")
    print(f"honest ones refused: {len(refused)} of {args.honest}: {refused}")
    sys.exit(bool(missed) or len(refused) * 60 > args.honest)


if __name__ == "__main__":
    main()
