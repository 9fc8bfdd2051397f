"""Whether how a task vector lies to the merge before it (`met` in the record of a fold) says what the fold does to the
models that are in it.

    python -m tests.campaigns.interference --work W         # the digits of the demonstration; some minutes

On six honest fine-tunes of the digits, under several rules, each candidate is folded alone: honest ones of other tasks
over two decades of learning rates, one less a part of a model that is in the merge, one that was trained to answer a
task wrongly, a negation, shuffled labels. For each the numbers are said beside the points that the worst of the six
tasks falls by; and for each number its rank correlation with that fall, and how often it is larger of a harmful model
(five points and more) than of one that does none (a point at most): 0.5 is chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

import continual
from continual.state.parts import MetNumbers
from tests.campaigns.evaluating import OFF, Ground, ask_each_rule, harms
from tests.campaigns.redteam import Red, scaled

RULES = ("tsv-m", "iso-c", "opcm", "task-arithmetic")
HARM, NONE = 5.0, 1.0


def candidates(ground: Ground) -> Iterator[tuple[str, Path]]:
    red = ground.red
    for number, task in enumerate(red.suite.tasks[len(ground.tasks) :]):
        for rate in (0.2, 1.0, 5.0):
            yield "honest", red.honest(task, rate, "full")
        if number < 4:
            yield "negated", red.changed(f"not-{task}", scaled(-1.0), red.honest(task, 1.0, "full"))
    for number, (name, made) in enumerate(harms(ground).items()):
        share = (0.3, 0.6, 1.0)[number % 3]
        weights = {key: red.weights[key] + value for key, value in made(share).items()}
        yield name, red.save(red.work / "candidates" / f"{name} {share:g}", weights)
    shuffled = red.work / "hostile" / "shuffled-labels"
    if not shuffled.exists():
        red.suite.train(red.suite.tasks[8], "shuffled", shuffled)
    yield "shuffled labels", shuffled


def figures(met: MetNumbers) -> dict[str, float]:
    """Numbers of a fold, each larger where more interference would be thought of."""
    found = {
        "most against": -min(met.cosines),
        "most along": max(met.cosines),
        "|cosine|, mean": sum(map(abs, met.cosines)) / len(met.cosines),
    }
    for name, values in (("overlap", met.overlap), ("conflict", met.conflict), ("removed", met.removed)):
        if values:
            found |= {f"{name}, most": max(values), f"{name}, mean": sum(values) / len(values)}
    return found


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def told_apart(harmful: Sequence[float], harmless: Sequence[float]) -> float:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in harmful for b in harmless]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def ask(red: Red, rule: str) -> None:
    ground = Ground(red, 6, rule=rule)
    rows: list[tuple[float, Mapping[str, float]]] = []
    for kind, path in candidates(ground):
        with ground.copy() as state:
            with continual.open(state, write=True, workers=1, gates=OFF) as merge:
                outcome = merge.fold(path)
                assert outcome.fate == "folded", outcome.message
                met = merge.state.ledger.folds()[-1].entry.numbers.met
            fall = max(ground.falls(ground.logits(state)).values())
        assert met is not None
        rows.append((fall, figures(met)))
        said = {name: round(value, 3) for name, value in rows[-1][1].items()}
        print(json.dumps({"rule": rule, "kind": kind, "model": path.name, "fall": round(fall, 1), **said}), flush=True)
    for name in rows[0][1]:
        values, falls = [row[1][name] for row in rows], [row[0] for row in rows]
        apart = told_apart(
            [v for v, f in zip(values, falls, strict=True) if f >= HARM],
            [v for v, f in zip(values, falls, strict=True) if f <= NONE],
        )
        print(f"{rule}: {name}: rank correlation {rank_correlation(values, falls):+.2f}, told apart {apart:.2f}")


if __name__ == "__main__":
    ask_each_rule(__doc__, RULES, ask)
