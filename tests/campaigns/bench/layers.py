"""Coefficients, measured: `continual tune` with `--what layers` and with `--what models-layers`, on a few rows a task,
against the reading that they begin at and against simply training on the same rows. Accuracy on test rows, which
nothing sees before.

    python -m tests.campaigns.bench.layers --work W --suite digits --form full --tasks 4 8 --trained 1 3
    python -m tests.campaigns.bench.layers --work W --suite digits --form lora --tasks 4 8 --rule tsv-m --rule regmean
    python -m tests.campaigns.bench.layers --work W --data DIR --data SETS --suite text --form lora --tasks 8
    python -m tests.campaigns.bench.layers --work W --data DIR --data SETS --suite language --form lora --tasks 4
    python -m tests.campaigns.bench.layers --work W --data SETS --suite vision --form full --tasks 8 --rows 60

W, DIR and SETS are those of `tests.campaigns.bench.quality`, whose fine-tunes are taken where they are there, and
trained where not. Full fine-tunes are folded into a state of whole tensors, adapters into one of adapters; read by the
default rule, or by each `--rule`; `regmean` is given the inputs of the same rows first. The rows are never trained on
by a fine-tune, and are no test rows; of vision there are 60 of these a task.

Trained on the rows: the base, and with `--merge-too` the merge, by the recipe of the fine-tunes, on all rows, those
that judge too, all weights and by LoRA (of text by LoRA alone), or as `--train` says; `--trained 1 3` as long as that
recipe and three times as long. `seconds` are CPU seconds, of what is learned without asking the test rows; `gigabytes`
the most that the process had until then, with the suite's own model. What the language model predicts of prompts stays,
as `--drift` says (inf: as it comes), and each candidate's `drift` is told. Minutes on digits; on the language model a
pass backwards takes three CPU seconds for 8 rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import continual
from continual.demo import digits as demo
from continual.making import WIDTH
from continual.objectives import Given, Said
from continual.tuning.learning import DRIFT
from tests.campaigns.bench.quality import digits as ways
from tests.campaigns.bench.quality import language, text, vision
from tests.campaigns.bench.quality.campaign import settle_threads
from tests.campaigns.bench.quality.suite import Form, Suite, Watching, fine_tune
from tests.campaigns.bench.selection.world import DigitsWorld, Seen, TextWorld

MODULE = "tests.campaigns.bench.layers"
WHAT = ("layers", "models-layers")


class Place(Protocol):
    """A suite with the rows that are learned from."""

    suite: Suite
    wanted: Sequence[str]
    forms: Sequence[Form]

    def learning(self, **more: Any) -> continual.Learning:
        """What is learned by."""
        ...

    def inputs(self, models: Sequence[str]) -> continual.TaskRows:
        """The same rows, to read what layers are given."""
        ...

    def trained(self, weights: Mapping[str, Tensor], form: Form, times: float) -> dict[str, Tensor]:
        """These weights after training on the rows, in one of `forms`, so many times as long as a fine-tune."""
        ...


class ByFunction:
    """A place whose objective is a function."""

    objective: str

    def learning(self, **more: Any) -> continual.Learning:
        """What is learned by."""
        return continual.Learning(self.objective, **more)

    def inputs(self, models: Sequence[str]) -> continual.TaskRows:
        """The same rows, to read what layers are given."""
        return continual.TaskRows(self.objective, tuple((model,) for model in models))


class OnDigits(ByFunction):
    """Digits seen in other ways; a row's loss is at a fitted confidence."""

    objective = f"{MODULE}:digits"
    forms: Sequence[Form] = ("full", "lora")

    def __init__(self, args: argparse.Namespace, count: int, seed: int) -> None:
        self.suite = ways.Digits(args.work / "digits")
        self.world = DigitsWorld(self.suite, seed, args.work / "layers")
        self.wanted, self.seed, self.rows = self.world.wanted[:count], seed, args.rows

    def of(self, task: str) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        images, labels = self.world.rows(task)
        return images[: self.rows], labels[: self.rows]

    def given(self, directory: Path) -> Given:
        """The objective."""
        model = demo.Digits()
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return Given(model.eval(), [Seen(model, *self.of(task)) for task in self.wanted])

    def trained(self, weights: Mapping[str, Tensor], form: Form, times: float) -> dict[str, Tensor]:
        """By the recipe of a fine-tune, twice as long where `times` is 1."""
        model: Any = demo.Digits()
        model.load_state_dict(dict(weights))
        model = ways.adapted(model, self.seed, frozen=False) if form == "lora" else model
        found = [self.of(task) for task in self.wanted]
        images, labels = torch.cat([rows[0] for rows in found]), torch.cat([rows[1] for rows in found])
        steps = round(2 * times * ways.STEPS[form])
        demo.train(model, images, labels, steps=steps, rate=ways.RATES[form], seed=self.seed)
        model = model.merge_and_unload() if form == "lora" else model
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


class OnText:
    """The sentence encoder; a row's loss is that of frozen heads at a fitted confidence."""

    forms: Sequence[Form] = ("lora",)

    def __init__(self, args: argparse.Namespace, count: int, seed: int) -> None:
        work, rows, self._dtype = args.work, args.rows, getattr(torch, args.dtype)
        self.suite = text.Text(work / "text", tuple(args.data), dtype=self._dtype)
        self.world = TextWorld(self.suite, seed, work / "layers-text", rows)
        self.wanted = self.world.wanted[:count]
        self.world.wanted = list(self.wanted)

    def learning(self, **more: Any) -> continual.Learning:
        """What is learned by."""
        asked = self.world.settings()
        return continual.Learning("heads", asked["rows"], asked["heads"], **more)

    def inputs(self, models: Sequence[str]) -> continual.TaskRows:
        """The same rows, to read what layers are given."""
        asked = self.world.settings()
        return continual.TaskRows("heads", tuple((model,) for model in models), asked["rows"], asked["heads"])

    def trained(self, weights: Mapping[str, Tensor], form: Form, times: float) -> dict[str, Tensor]:
        """LoRA by the recipe of a fine-tune: 400 steps of one task after the other."""
        return self.world.learn(form, weights, round(400 * times), self._dtype)


class OnVision(ByFunction):
    """The vision transformer; a row's loss is that of frozen heads at a fitted confidence."""

    objective = f"{MODULE}:images"
    forms: Sequence[Form] = ("full", "lora")

    def __init__(self, args: argparse.Namespace, count: int, seed: int) -> None:
        self.suite = vision.Vision(args.work / "vision", tuple(args.data))
        tasks = list(self.suite.tasks)
        random.Random(1000 + seed).shuffle(tasks)
        self.wanted, self.seed, self.rows = tasks[:count], seed, args.rows

    def of(self, task: str) -> tuple[Tensor, Tensor]:
        """Images and labels, of those by which the quality benchmark chooses: no others were not trained on."""
        images, labels, _ = self.suite.rows(task)
        kept = slice(-vision.VALIDATION - vision.TEST, -vision.TEST)
        return images[kept][: self.rows], labels[kept][: self.rows]

    def given(self, directory: Path) -> Given:
        """The objective."""
        model = vision.load(directory)
        return Given(model, [Seen(Headed(model, self.suite._head(task)), *self.of(task)) for task in self.wanted])

    def trained(self, weights: Mapping[str, Tensor], form: Form, times: float) -> dict[str, Tensor]:
        """By the recipe of a fine-tune, a step of one task after the other."""
        model = vision.load(self.suite.prepare())
        model.load_state_dict({name: weights.get(name, value) for name, value in model.state_dict().items()})
        torch.manual_seed(self.seed)
        if form == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        parts = [(self.suite._head(task), self.of(task)) for task in self.wanted]
        vision.learn_all(model, parts, round(times * vision.STEPS[form]), vision.RATES[form], self.seed)
        model = model.merge_and_unload() if form == "lora" else model
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Headed(nn.Module):
    """The logits of a task's classes."""

    def __init__(self, model: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits, rows × classes."""
        return vision.embedded(self.model, images) @ self.head.T / vision.TEMPERATURE


class OnLanguage(ByFunction):
    """The language model; a row's loss is that of its answer, as the suite asks for it."""

    objective = f"{MODULE}:answers"
    forms: Sequence[Form] = ("full", "lora")

    def __init__(self, args: argparse.Namespace, count: int, seed: int) -> None:
        self.suite = language.Language(args.work / "language", tuple(args.data))
        tasks = list(self.suite.tasks[:8])
        random.Random(1000 + seed).shuffle(tasks)
        self.wanted, self.seed, self._count = tasks[:count], seed, args.rows

    def rows(self, task: str) -> list[Any]:
        """Rows that are neither trained on, nor those by which the quality benchmark chooses."""
        left = list(self.suite._task(task).validation[language.VALIDATION :])
        random.Random(f"{self.seed} {task}").shuffle(left)
        return left[: self._count]

    def given(self, directory: Path) -> Given:
        """The objective."""
        model, tokenizer = language.load(directory)
        tasks = []
        for task in self.wanted:
            words = [tokenizer(word)["input_ids"][0] for word in self.suite._task(task).choices]
            rows = [language.encode(tokenizer, row) for row in self.rows(task)]
            tasks.append(Answers(model, [first(*row) for row in rows] if words else rows, words))
        return Given(model, tasks)

    def trained(self, weights: Mapping[str, Tensor], form: Form, times: float) -> dict[str, Tensor]:
        """By the recipe of a fine-tune, as many steps for all the tasks."""
        model, tokenizer = language.load(self.suite.prepare())
        model.load_state_dict({name: weights.get(name, value) for name, value in model.state_dict().items()})
        torch.manual_seed(self.seed)
        wrapped = language.adapted(model, 16, frozen=False) if form == "lora" else model
        rows = [row for task in self.wanted for row in self.rows(task)]
        steps = round(times * language.STEPS[form])
        language.learn(model, tokenizer, rows, steps, language.RATES[form], self.seed)
        model = wrapped.merge_and_unload() if form == "lora" else model
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def first(seen: list[int], wanted: list[int]) -> tuple[list[int], list[int]]:
    """A row up to the first token of its answer, by which the suite tells label words apart."""
    stop = 1 + next(place for place, token in enumerate(wanted) if token != language.IGNORED)
    return seen[:stop], wanted[:stop]


class Answers:
    """A task of the language model. `words`: the first tokens of the label words, where it has some."""

    def __init__(self, model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], words: Sequence[int]) -> None:
        self.model, self.rows, self.count = model, rows, len(rows)
        self.words = torch.tensor(words, dtype=torch.int64)

    def says(self, rows: Sequence[int]) -> Said:
        """The logits where an answer is wanted, for a teacher; of a label word those that the suite chooses from."""
        tokens, wanted = language.batch([self.rows[row] for row in rows])
        logits, where = language.scores(self.model, tokens, wanted)
        return Said(logits[:, self.words] if len(self.words) else logits, where.nonzero()[:, 0])

    def prompts(self, rows: Sequence[int]) -> Said:
        """The logits of the tokens before the answer, all but the first."""
        tokens, wanted = language.batch([self.rows[row] for row in rows])
        answer = (wanted != language.IGNORED).int().argmax(1, keepdim=True)
        before = tokens.roll(-1, 1).masked_fill(torch.arange(tokens.shape[1]) >= answer, language.IGNORED)
        logits, where = language.scores(self.model, tokens, before)
        return Said(logits, where.nonzero()[:, 0])

    def losses(self, rows: Sequence[int]) -> Tensor:
        """The mean over the tokens of each answer; of a label word over the words that the suite chooses from."""
        tokens, wanted = language.batch([self.rows[row] for row in rows])
        logits, where = language.scores(self.model, tokens, wanted)
        if len(self.words):
            chosen = (wanted[where][:, None] == self.words).int().argmax(1)
            return functional.cross_entropy(logits[:, self.words], chosen, reduction="none")
        nats = functional.cross_entropy(logits, wanted[where], reduction="none")
        each = torch.zeros(len(rows)).index_add(0, where.nonzero()[:, 0], nats)
        return each / where.sum(1)


PLACE: dict[str, Any] = {}


def digits(directory: Path, _device: torch.device) -> Given:
    """The objective of the digits, as `module:function`."""
    given: Given = PLACE["now"].given(directory)
    return given


PLACES: Mapping[str, Callable[[argparse.Namespace, int, int], Place]] = {
    "digits": OnDigits,
    "text": OnText,
    "language": OnLanguage,
    "vision": OnVision,
}
answers = images = digits
"""That of the language model, and of vision."""


def asked(place: Place, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """On test rows: how many are right, in per cent, the mean over the tasks; and what the suite watches."""
    found = [place.suite.correct(weights, task, "test").float().mean() for task in place.wanted]
    told: dict[str, Any] = {"right": round(100 * float(sum(found)) / len(found), 2)}
    if isinstance(place.suite, Watching):
        told |= {name: round(value, 3) for name, value in place.suite.watch(weights, []).items()}
    return told


def used(begun: float) -> dict[str, float]:
    """CPU seconds since then, and the most memory until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(time.process_time() - begun, 1), "gigabytes": round(peak / (1 << 20), 1)}


def weights_of(merge: continual.Merge, where: Path) -> dict[str, Tensor]:
    """What an export of the merge holds, in float32."""
    shutil.rmtree(where, ignore_errors=True)
    merge.export(continual.Target(where, dtype="F32"))
    found = load_file(where / "model.safetensors")
    shutil.rmtree(where)
    return found


def measured(place: Place, form: Form, args: argparse.Namespace) -> dict[str, Any]:
    """Folds, learns, trains and asks."""
    work = args.work
    importlib.import_module(MODULE).PLACE["now"] = place  # which is another module than this one, where it is run
    base, state = place.suite.prepare(), work / f"layers-state-{place.suite.name}-{form}"
    shutil.rmtree(state, ignore_errors=True)
    continual.init(base, state, continual.Recipe(width=WIDTH if form == "lora" else None))
    told: dict[str, Any] = {"suite": place.suite.name, "form": form, "tasks": len(place.wanted)}
    models = [fine_tune(place.suite, task, form) for task in place.wanted]
    with continual.open(state, write=True, workers=1, max_base_ratio=100.0) as merge:
        for model in models:
            merge.fold(model)
        told["base"] = asked(place, load_file(base / "model.safetensors"))
        start = weights_of(merge, work / "layers-export")
        if "regmean" in args.rule:
            merge.read_inputs(place.inputs([model.name for model in models]))
        for rule in args.rule or (merge.rule.name,):
            merge.rescale("auto", rule=rule)
            print(rule, flush=True)
            told[rule] = learned(merge, place, [str(model) for model in models], args)
    shutil.rmtree(state)
    before = {"base": load_file(base / "model.safetensors"), "merge": start}
    for name, weights in list(before.items())[: 2 if args.merge_too else 1]:
        for how in args.train or place.forms:
            for times in args.trained:
                begun = time.process_time()
                trained = place.trained(weights, how, times)
                took = used(begun)
                found = {f"{name}, {how}, {times:g}": asked(place, trained) | took}
                print(json.dumps(found), flush=True)
                told |= found
    return told


def learned(merge: continual.Merge, place: Place, models: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """What the merge is worth as it is read by default, and with coefficients of either kind."""
    export = args.work / "layers-export"
    told: dict[str, Any] = {"default": asked(place, weights_of(merge, export))}
    print(json.dumps(told), flush=True)
    for what in args.what:
        learning = place.learning(
            calibration={"batch": args.batch, "dtype": args.dtype},
            candidates=args.candidates,
            teachers=tuple(models) if args.teachers else (),
            models=what == "models-layers",
            drift=args.drift,
        )
        begun = time.process_time()
        tuned = merge.tune_layers(learning)
        took = used(begun)
        told[what] = asked(place, weights_of(merge, export)) | took
        told[what]["judged"] = [round(-trial.score, 4) for trial in tuned.entry.trials]
        if tuned.entry.drift is not None:
            told[what]["drift"] = [round(trial.drift or 0.0, 4) for trial in tuned.entry.trials]
        print(json.dumps({what: told[what]}), flush=True)
        merge.rescale("auto")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where fine-tunes and states are kept")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder with text/; repeatable")
    parser.add_argument("--suite", choices=tuple(PLACES), required=True)
    parser.add_argument("--form", choices=("full", "lora"), required=True)
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 8], help="numbers of models that are merged")
    parser.add_argument("--rows", type=int, default=100, help="rows a task, at most 100")
    parser.add_argument("--seeds", type=int, default=3, help="draws of tasks and rows")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--batch", type=int, default=100, help="rows at a time")
    parser.add_argument("--teachers", action="store_true", help="each fine-tune says what is right, not the labels")
    parser.add_argument("--dtype", default="float32", help="of what is learned; text is trained and asked in it too")
    parser.add_argument("--rule", action="append", default=[], help="rules that read; by default that of the state")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="coefficients that are learned")
    parser.add_argument("--trained", type=float, nargs="*", default=[], help="how long the base is trained on the rows")
    parser.add_argument("--train", nargs="+", choices=("full", "lora"), default=[], help="in which forms")
    parser.add_argument("--drift", type=float, default=DRIFT, help="of what is predicted of prompts; inf: as it comes")
    parser.add_argument("--merge-too", action="store_true", help="the merge is trained on the rows as well")
    args = parser.parse_args()
    settle_threads(1)
    for count in args.tasks:
        for seed in range(args.seeds):
            place: Place = PLACES[args.suite](args, count, seed)
            print(json.dumps(measured(place, args.form, args) | {"seed": seed}), flush=True)


if __name__ == "__main__":
    main()
