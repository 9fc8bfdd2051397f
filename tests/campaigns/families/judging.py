"""What continual makes of each fine-tune of a family, against what the library and PEFT make of it: a verdict a cell.

A fine-tune is folded alone into a fresh state with the rule `mean` at scale 1, and exported. The export is loaded by
the library, and every tensor and the answer to a fixed question are compared.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import peft
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.errors import ContinualError
from continual.publish.lora import LoraTarget
from tests.campaigns.families import adapters
from tests.campaigns.families.family import Family
from tests.campaigns.families.making import (
    Tensors,
    Unloadable,
    asked,
    loaded,
    made,
    moved,
    quiet,
    slug,
    tensors_of,
)

Verdict = Literal["right", "told", "refused", "wrong", "silent loss", "n/a", "unfit"]
CLOSE = 2e-6
"""How far a value may be from what PEFT merges, in parts of the largest value of the tensor: both multiply in float32,
in another order."""
CLOSE_ANSWER = 2e-4
"""How far an answer may be, in parts of its largest value, where the tensors are not equal bit by bit."""
_HIGHEST_RANK = 4096
_LONGEST = 100.0
"""Tiny random models: what is moved of them is long beside them, and how long is not asked here."""


class Cell(NamedTuple):
    """What came of one fine-tune of a family, and the line that says why."""

    verdict: Verdict
    said: str = ""


class Truth(NamedTuple):
    """What an export is to be: its tensors as the library holds them, its answer, and whether every bit must agree.
    `use`: what PEFT answers with an adapter that it has not merged."""

    tensors: Tensors
    answer: torch.Tensor
    exact: bool
    use: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """A family and its directory: `base` and `full` are in it, and what is written on the way. `older` has what another
    transformers wrote, where that is asked for."""

    family: Family
    directory: Path
    older: Path | None = None

    @property
    def base(self) -> Path:
        """The base that this library wrote."""
        return self.directory / "base"

    def prepare(self) -> None:
        """Writes the base and the full fine-tune. Raises ImportError, Unloadable, and what the library raises."""
        made(self.family).save_pretrained(self.base)
        moved(loaded(self.family, self.base)).save_pretrained(self.directory / "full")

    def truth(self, directory: Path) -> Truth:
        """What the library makes of a whole model."""
        model = loaded(self.family, directory)
        return Truth(tensors_of(model), asked(self.family, model), exact=True)

    def of_adapter(self, directory: Path, base: Path) -> Truth:
        """What PEFT makes of an adapter: merged, or in use where it cannot merge it. Raises what PEFT raises."""
        wrapped = adapters.applied(self.family, base, directory)
        use = asked(self.family, wrapped)
        merged = wrapped.merge_and_unload()
        return Truth(tensors_of(merged), asked(self.family, merged), exact=False, use=use)

    @contextlib.contextmanager
    def folded(self, base: Path, candidate: Path) -> Iterator[tuple[api.Merge, api.Outcome]]:
        """A fresh state of `base` with `candidate` folded into it."""
        state = self.directory / "state"
        shutil.rmtree(state, ignore_errors=True)
        making.init(base, state, making.Recipe(rule="mean", scale="1"))
        with api.open(state, write=True, max_base_ratio=_LONGEST) as merge:
            yield merge, merge.fold(candidate)

    def exported(self, merge: api.Merge, name: str) -> Path:
        """The merged model, in a directory that is new."""
        target = self.directory / name
        shutil.rmtree(target, ignore_errors=True)
        return merge.export(target)


def judge(bench: Bench, base: Path, candidate: Path, truth: Truth) -> Cell:
    """Folds `candidate` alone, and compares the export with the truth."""
    before = tensors_of(loaded(bench.family, base))
    with bench.folded(base, candidate) as (merge, outcome):
        if outcome.fate != "folded":
            return Cell("refused", outcome.line())
        try:
            model = loaded(bench.family, bench.exported(merge, "export"))
        except Unloadable as error:
            return Cell("wrong", f"the export is not loaded whole: {error}")
        return compared(before, truth, tensors_of(model), asked(bench.family, model), outcome.line())


def compared(before: Tensors, truth: Truth, after: Tensors, answer: torch.Tensor, line: str) -> Cell:
    """The verdict on an export's tensors and answer."""
    if truth.tensors.keys() != after.keys():
        return Cell("wrong", f"other tensors: {_some(sorted(truth.tensors.keys() ^ after.keys()))}")
    wrong = [name for name, wanted in truth.tensors.items() if not _same(wanted, after[name], truth.exact)]
    lost = [
        name
        for name in wrong
        if name in before
        and torch.equal(before[name], after[name])
        and not torch.equal(before[name], truth.tensors[name])
    ]
    if lost and len(lost) == len(wrong):
        named = [name for name in lost if name_said(name, line)]
        return Cell(
            "told" if named else "silent loss", line if named else f"{_some(lost)} as in the base; said: {line}"
        )
    use = truth.answer if truth.use is None else truth.use
    if wrong and not _near(use, truth.answer, CLOSE_ANSWER) and _near(use, answer, CLOSE_ANSWER):
        return Cell("right", "as PEFT answers in use; what it merges answers otherwise")
    if wrong:
        worst = max(wrong, key=lambda name: _gap(truth.tensors[name], after[name]))
        gap = _gap(truth.tensors[worst], after[worst])
        return Cell("wrong", f"{len(wrong)} tensors differ, most {worst} by {gap:.1e} of its largest value")
    if not _near(truth.answer, answer, 0.0 if truth.exact else CLOSE_ANSWER):
        return Cell("wrong", f"equal tensors, another answer, by {_gap(truth.answer, answer):.1e}")
    if truth.exact and all(torch.equal(before[name], after[name]) for name in after if name in before):
        return Cell("wrong", "nothing has moved: the campaign itself is wrong")
    return Cell("right")


def name_said(name: str, line: str) -> bool:
    """Whether a line names this tensor: by the last two parts of its name at least."""
    return ".".join(name.split(".")[-2:]) in line


def again(bench: Bench) -> Cell:
    """The export folded alone into another state gives the same export, byte for byte."""
    with bench.folded(bench.base, bench.directory / "full") as (merge, outcome):
        if outcome.fate != "folded":
            return Cell("refused", outcome.line())
        once = bench.exported(merge, "once")
    with bench.folded(bench.base, once) as (merge, outcome):
        if outcome.fate != "folded":
            return Cell("refused", f"its own export: {outcome.line()}")
        twice = bench.exported(merge, "twice")
    one, two = written(once), written(twice)
    if one.keys() != written(bench.base).keys():
        return Cell("wrong", f"other names than the base's: {_some(sorted(one.keys() ^ written(bench.base).keys()))}")
    differ = [
        name
        for name in one.keys() | two.keys()
        if name not in one or name not in two or not torch.equal(one[name], two[name])
    ]
    return Cell("wrong", f"the second export differs in {_some(sorted(differ))}") if differ else Cell("right")


def as_lora(bench: Bench) -> Cell:
    """An adapter of full rank, on the base by PEFT, answers as the export does whose other tensors are the base's."""
    target = bench.directory / "as-lora"
    with bench.folded(bench.base, bench.directory / "full") as (merge, outcome):
        if outcome.fate != "folded":
            return Cell("refused", outcome.line())
        report = merge.export_lora(LoraTarget(target, _HIGHEST_RANK))
        export = bench.exported(merge, "export")
    origin, values = written(bench.base), written(export)
    matrices = [name for name in report.left_out if origin[name].ndim == 2 and min(origin[name].shape) > 1]
    (file,) = export.glob("*.safetensors")
    save_file({n: origin[n] if n in report.left_out else t for n, t in values.items()}, file, {"format": "pt"})
    wanted = loaded(bench.family, export)
    wrapped = peft.PeftModel.from_pretrained(loaded(bench.family, bench.base), target).eval()
    fresh = [
        n
        for n, t in wrapped.named_parameters()
        if "lora_" in n and ("lora_B" in n or "embedding_B" in n) and not t.any()
    ]
    if fresh:
        return Cell("wrong", f"PEFT finds no factors for {_some(fresh)}")
    cell = compared(
        tensors_of(loaded(bench.family, bench.base)),
        Truth(tensors_of(wanted), asked(bench.family, wanted), exact=False),
        tensors_of(wrapped.merge_and_unload()),
        asked(bench.family, wrapped),
        "",
    )
    if cell.verdict == "silent loss":
        return Cell("wrong", f"PEFT leaves as in the base: {cell.said.partition(' as in the base')[0]}")
    return (
        Cell("right", f"left out, as told: {_some(matrices)}" if matrices else "") if cell.verdict == "right" else cell
    )


def of_kind(bench: Bench, kind: str) -> Cell:
    """An adapter of a kind, against what PEFT merges of it."""
    directory = bench.directory / f"adapter-{re.sub('[^a-z0-9]+', '-', kind.lower())}"
    try:
        adapters.write(bench.family, bench.base, directory, adapters.KINDS[kind])
        truth = bench.of_adapter(directory, bench.base)
    except adapters.Unfit as error:
        return Cell("unfit", str(error))
    except Exception as error:  # of a library: whatever it is, it is why there is nothing to compare with
        return Cell("n/a", f"PEFT: {_brief(error)}")
    return judge(bench, bench.base, directory, truth)


def crossed(bench: Bench, name: str) -> Cell:
    """A base written by one major version of transformers, and a fine-tune by another."""
    assert bench.older is not None
    if bench.family.library != "transformers":
        return Cell("unfit", "no model of transformers")
    older = bench.older / slug(bench.family)
    if (older / "error.txt").exists():
        return Cell("n/a", f"transformers 4: {(older / 'error.txt').read_text('utf-8')}")
    try:
        theirs = loaded(bench.family, older / "base")
        again = bench.directory / "rewritten"
        if not again.exists():
            theirs.save_pretrained(again)
            moved(theirs).save_pretrained(bench.directory / "newer")
        if name == "base 4, full 5":
            base, candidate, told = older / "base", bench.directory / "newer", bench.directory / "newer"
        else:
            base = again
            candidate, told = (older / "full",) * 2 if name == "base 5, full 4" else (older / "lora", older / "merged")
        truth = bench.truth(told)._replace(exact=candidate == told)
    except Exception as error:
        return Cell("n/a", f"transformers 5: {_brief(error)}")
    return judge(bench, base, candidate, truth)


def guarded(work: Callable[[], Cell]) -> Cell:
    """A cell; an error of continual that is no outcome is a refusal where it is one by its class, else wrong."""
    try:
        with quiet():
            return work()
    except ContinualError as error:
        return Cell("refused", _brief(error))
    except Exception as error:
        return Cell("wrong", _brief(error))


def written(directory: Path) -> Tensors:
    """Every tensor in a directory's weight files, by the names in the files."""
    found: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _same(wanted: torch.Tensor, found: torch.Tensor, exact: bool) -> bool:
    if exact or not wanted.is_floating_point():
        return torch.equal(wanted, found)
    return wanted.shape == found.shape and _near(wanted, found, CLOSE)


def _near(wanted: torch.Tensor, found: torch.Tensor, within: float) -> bool:
    return wanted.shape == found.shape and _gap(wanted, found) <= within


def _gap(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value; infinite where the shapes differ."""
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    wanted, found = wanted.double(), found.double()
    gap = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-30))
    return gap if gap == gap else float("inf")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]
