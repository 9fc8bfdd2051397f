"""What a task vector that is longer or shorter than the others does to a merge: what the gate `norms` goes by.

    python -m tests.campaigns.other_lengths --work W         # the digits of the demonstration; some minutes

On six honest fine-tunes, under several rules: one of another task with its task vector times a factor, folded alone;
and the same of several, one after the other. Each line says by how many points the six tasks fall, in the mean and
where most; a factor of 1 is an honest model, beside which the others are to be seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean

from torch import Tensor

import continual
from tests.campaigns.evaluating import OFF, Ground, ask_each_rule
from tests.campaigns.redteam import Red, scaled

RULES = ("tsv-m", "iso-c", "mean", "task-arithmetic", "opcm")
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 8.0, 16.0)


def several(ground: Ground, models: list[Path]) -> Mapping[str, Tensor]:
    """What the merge says once all of these are in it as well."""
    with ground.copy() as state:
        with continual.open(state, write=True, workers=1, gates=OFF) as merge:
            for model in models:
                assert merge.fold(model).fate == "folded", model
        return ground.logits(state)


def asked(ground: Ground, rule: str) -> Iterator[Mapping[str, object]]:
    red = ground.red
    others = red.suite.tasks[len(ground.tasks) : len(ground.tasks) + 6]
    for factor in FACTORS:
        made = [
            red.changed(f"{task}-times-{factor:g}", scaled(factor), red.honest(task, 1.0, "full")) for task in others
        ]
        alone = [ground.falls(ground.with_one_more(model)) for model in made]
        together = ground.falls(several(ground, made))
        yield {
            "rule": rule,
            "factor": factor,
            "one": round(mean(mean(falls.values()) for falls in alone), 2),
            "one, worst": round(max(max(falls.values()) for falls in alone), 1),
            "six": round(mean(together.values()), 2),
            "six, worst": round(max(together.values()), 1),
        }


def ask(red: Red, rule: str) -> None:
    for line in asked(Ground(red, 6, rule=rule), rule):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    ask_each_rule(__doc__, RULES, ask)
