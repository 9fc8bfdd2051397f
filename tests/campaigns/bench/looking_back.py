"""What it costs to look back: `diff`, what an export says of its models, `explain`, against an export in the same
process; a replay against all folds; and the proof that a model was taken out, against taking it out.

    python -m tests.campaigns.bench.looking_back [--gigabytes 0.5] [--rules mean tsv-m] [--models 4] [--repeats 3]
        [--only removal]

A bf16 model with random fine-tunes, each folded by one thread into a state of whole tensors; and a state of adapters of
the same base. CPU seconds, medians of `--repeats`, and the ratio to an export; memory is what came beyond what was held
at the peak of a diff, over the largest tensor in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from continual import api, making
from continual.config import Settings
from continual.engine.attributing import Sketched
from continual.publish.folder import Target
from continual.removal.verifier import verify
from tests.helpers import adapters, models

GATES = ["noise.act=off", "norms.act=off", "copies.act=off"]


def peak() -> int:
    """VmHWM of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def turn(merge: api.Merge, scratch: Path) -> dict[str, float]:
    """The figures of one turn."""
    found = {}

    def exported(**more: bool) -> None:
        merge.export(Target(scratch, **more))  # type: ignore[arg-type]

    found["export"] = seconds(exported)
    said = json.loads((scratch / "continual.json").read_text())
    found["bytes of shares"] = len(json.dumps({key: said[key] for key in said if key.startswith("shares")}))
    shutil.rmtree(scratch)
    found["export --explain"] = seconds(lambda: exported(explain=True))
    shutil.rmtree(scratch)
    with merge.state.lease():
        reading = merge.reading()
        if merge.state.format.form is None:
            found["shares in an export"] = seconds(lambda: (kept := Sketched(reading)).told(kept.sums()))
    found["explain"] = seconds(merge.explain)
    Path("/proc/self/clear_refs").write_text("5")
    held = peak()
    found["diff"] = seconds(lambda: merge.diff("2", "HEAD"))
    largest = max(spec.numel for spec in merge.state.format.tensors)
    found["memory of a diff"] = (peak() - held) / (4 * largest)
    return found


def fold(merge: api.Merge, model: Path) -> None:
    """Folds a model, which has to be let in."""
    outcome = merge.fold(model)
    assert outcome.fate == "folded", outcome.message


def again(merge: api.Merge, place: Path) -> None:
    """Builds the state again, which has to be equal."""
    found = merge.replay(place)
    assert found.equal, found.differs
    shutil.rmtree(place)


def removal(work: Path, base: Path, rule: str) -> None:
    """What a proof costs beside the unfold that it is about, and how near that comes to never folding."""
    merged = []
    for skipped in (None, 3):
        making.init(base, work / "state", making.Recipe(rule=rule))
        with api.Merge(Settings(state=work / "state", workers=1, gates=GATES), write=True) as merge:
            for number in range(8):
                place = work / f"removal-{number}"
                models.fine_tune(base, place, number)
                if number != skipped:
                    assert merge.fold(place).fate == "folded"
                if number != 3:
                    shutil.rmtree(place)
            if skipped is None:
                with merge.state.lease():
                    unfolding = seconds(lambda: merge.unfold(merge.look_unfold("removal-3")))
                    certifying = seconds(lambda: merge.certify(merge.head, work / "certificate.json"))
                certificate = json.loads((work / "certificate.json").read_text())
                state, model = merge.state.path, work / "removal-3"
                verifying = seconds(partial(verify, certificate, state, state, model, base))
            names = [spec.name for spec in merge.state.format.tensors]
            merged.append([merge.read(name) for name in names])
        shutil.rmtree(work / "state")
        shutil.rmtree(work / "removal-3")
    change = math.fsum(float((a - b).double().square().sum()) for a, b in zip(*merged, strict=True))
    length = math.fsum(float(b.double().square().sum()) for b in merged[1])
    nbytes = (work / "certificate.json").stat().st_size
    print(
        f"  {rule}, 8 folded and one taken out: off by {math.sqrt(change / length):.2g} of what never had it; unfold "
        f"{unfolding:.2f} s, certificate {certifying / unfolding:.2f} and check {verifying / unfolding:.2f} of that; "
        f"{nbytes / 1000:.0f} kB; rounding at most {certificate['bound']:.2g}"
    )
    (work / "certificate.json").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rules", nargs="+", default=["mean", "tsv-m"])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("all", "removal"), default="all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base = models.base(work / "base", shapes=models.big_shapes(args.gigabytes, layers=24), dtype=torch.bfloat16)
        size = (base / "model.safetensors").stat().st_size / 1e9
        print(f"model of {size:.2f} GB, {args.models} models; CPU seconds, medians of {args.repeats}")
        for rule in ("mean", "task-arithmetic"):
            removal(work, base, rule)
        for form in (*args.rules, "adapters") if args.only == "all" else ():
            state = work / "state"
            width = 64 if form == "adapters" else None
            making.init(base, state, making.Recipe(rule=None if width else form, width=width))
            settings = Settings(state=state, workers=1, keep=50, max_base_ratio=100.0, gates=GATES)
            with api.Merge(settings, write=True) as merge:
                tunes, folding = [work / f"fine-tune-{number}" for number in range(args.models)], 0.0
                for number, place in enumerate(tunes):
                    made = adapters.lora(place, base, number) if width else models.fine_tune(base, place, number)
                    folding += seconds(partial(fold, merge, made))
                replaying = seconds(lambda: again(merge, work / "again")) / folding
                for place in tunes:
                    shutil.rmtree(place)
                turns = [turn(merge, work / "out") for _ in range(args.repeats)]
            median = {key: statistics.median(each[key] for each in turns) for key in turns[0]}
            nbytes, memory = median.pop("bytes of shares"), median.pop("memory of a diff")
            ratios = ", ".join(f"{key} {value:.3f} ({value / median['export']:.3f})" for key, value in median.items())
            print(
                f"  {form}: {ratios}; {nbytes:.0f} bytes of shares; memory of a diff {memory:.1f} largest tensors; "
                f"replay {replaying:.2f} of all folds"
            )
            shutil.rmtree(state)


if __name__ == "__main__":
    main()
