"""How long a state takes to open, to look at and to fold into, by how many records its ledger has.

`python -m tests.campaigns.bench.ledger` makes a small state, gives it 10, 1,000 and 10,000 records (three of four are
folds, the others refusals) and prints, in CPU seconds and as the least of five: opening it in a process that runs,
`continual status` and `continual log -n 20`, and folding two more models in a process that runs, the first of which
reads what the ledger says of those in the merge; and the peak memory of that process. `--to FOLDER` keeps the states;
`--gigabytes` makes the model that large, in bfloat16 (else it has 26 kB); `--rule` names another rule than iso-c.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import continual
from continual.state import State, framing
from tests.helpers import models

SIZES = (10, 1_000, 10_000)
TIMES = 5
FOLD = """
import json, sys, time
from pathlib import Path
import continual
state, *models = sys.argv[1:]
seconds = []
with continual.open(state, write=True) as merge:
    merge.engine  # what is loaded once
    for model in models:
        before = time.process_time()
        outcome = merge.fold(model)
        seconds.append(time.process_time() - before)
        assert outcome.fate == "folded", outcome
with open("/proc/self/status") as lines:  # ru_maxrss begins with what the process had that started this one
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps([*seconds, peak]))
"""


def grown(state: Path, records: int) -> None:
    """Adds records to the state's ledger until it has so many, as if so many models had come: files alone, since the
    commit protocol would take an hour."""
    commits = sorted((state / "commits").glob("*.json"))
    body, crc = framing.decode(commits[-1])
    assert body["kind"] == "fold", body["kind"]
    for seq in range(len(commits), records):
        data, crc = framing.encode(_next(body, seq, crc))
        (state / "commits" / f"{seq:08d}.json").write_bytes(data)
    (state / "HEAD").write_bytes(framing.encode({"seq": records - 1, "crc": crc})[0])


def _next(body: dict[str, Any], seq: int, prev: str) -> dict[str, Any]:
    """A record like the fold `body`: every fourth is a refusal."""
    candidate = {**body["candidate"], "key": f"folder:{seq:032x}", "name": f"m{seq}", "origin": f"/models/m{seq}"}
    numbers = {**body["numbers"], "sketch": _sketch(body["numbers"]["sketch"], seq)}
    said = {"candidate": candidate, "digest": f"blake3:{seq:064x}", "numbers": numbers}
    found = {**body, "seq": seq, "prev": prev, **said}
    if seq % 4 == 0:
        said = {"kind": "refuse", "fate": "refused", "reason": "vocab", "message": f"m{seq}: another vocabulary"}
        found |= {**said, "digest": None, "totals": None, "numbers": {"settings": {"vocab": "refuse"}}}
    return found


def _sketch(like: dict[str, Any], seq: int) -> dict[str, Any]:
    """The sketch of another model: as long, of random values."""
    head = 4 * len(like["norms"])
    text = base64.b64decode(like["values"])
    values = random.Random(seq).randbytes(len(text) - head)
    return {**like, "values": base64.b64encode(text[:head] + values).decode()}


def _least(what: Callable[[], float]) -> float:
    return min(what() for _ in range(TIMES))


def _opened(state: Path) -> float:
    before = time.process_time()
    State.open(state).close()
    return time.process_time() - before


def _command(*words: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "continual", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _folded(state: Path, models: Sequence[Path], copies: Path) -> list[float]:
    """Seconds of each fold of one process, and its MiB, the least of all."""
    told = []
    for number in range(TIMES):
        copy = shutil.copytree(state, copies / str(number))
        done = subprocess.run(
            [sys.executable, "-c", FOLD, str(copy), *map(str, models)], check=True, capture_output=True, text=True
        )
        told.append(json.loads(done.stdout))
        shutil.rmtree(copy)
    return [min(column) for column in zip(*told, strict=True)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, help="keep the states here")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--no-fold", action="store_true", help="leave the folds out")
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--rule", default="iso-c")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = wanted.to or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if wanted.gigabytes:
            shapes = models.big_shapes(wanted.gigabytes, layers=12)
            base = models.base(folder / "base", shapes=shapes, dtype=torch.bfloat16)
        else:
            base = models.base(folder / "base")
        first, *others = (models.fine_tune(base, folder / f"fine-tune-{seed}", seed=seed) for seed in (1, 2, 3))
        print(
            "| records | open | status | log -n 20 | first fold | next fold | memory |\n|---|---|---|---|---|---|---|",
            flush=True,
        )
        for records in wanted.sizes:
            state = folder / f"state-{records}"
            continual.init(base, state, continual.Recipe(rule=wanted.rule))
            with continual.open(state, write=True) as merge:
                merge.fold(first)
            grown(state, records)
            State.open(state, write=True).close()  # what a writer makes of it once
            row = [_least(lambda s=state: _opened(s))]
            row += [_least(lambda w=words, s=state: _command(*w, "--state", str(s))) for words in (["status"], ["log"])]
            *seconds, memory = (0.0, 0.0, 0.0) if wanted.no_fold else _folded(state, others, folder)
            print(f"| {records} | {' | '.join(f'{x:.3f}' for x in (*row, *seconds))} | {memory:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
