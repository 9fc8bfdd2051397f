"""What a type checker knows of the public API. Mypy reads it; an ignored error that is none is an error."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import continual
from continual import Merge, Outcome, Recipe, Rows, Settings, Survey, Target, Tuned, Tuning

assert_type(continual.init("base", Path("state"), Recipe(rule="opcm", options={"alpha": 0.5})), Survey)
with continual.open("state", write=True, keep=3) as merge:
    assert_type(merge, Merge)
    assert_type(merge.fold("model"), Outcome)
    report = merge.fold("model").report
    if report is not None:
        assert_type(report.numbers.tau_norm, float)
    assert_type(merge.export(Target("out", dtype="BF16")), Path)
    assert_type(merge.export("out"), Path)
    assert_type(merge.tune(Rows("causal-lm", "rows.jsonl"), Tuning(work="scratch")), Tuned)
    merge.rescale(7)  # type: ignore[arg-type]
    merge.refold("model")  # type: ignore[attr-defined]
assert_type(Settings(keep=3).keep, int)
Settings(kepe=3)  # type: ignore[call-arg]
gone = continual.Asked  # type: ignore[attr-defined]
