"""Models that teach: each says what is right of the rows of one task, and is gone before anything is tried. One of a
state of adapters is read from there; any other from its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from continual.engine.block_reading import BlockReading
from continual.engine.engine import Engine
from continual.engine.reading import Reading
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.executors.contract import silent
from continual.objectives.calibration import Calibration, load
from continual.objectives.parameters import Parameters
from continual.objectives.wanted_losses import Wanted
from continual.records import FileDigest
from continual.rules import ReadOptions
from continual.tuning import scoring


def teach(
    engine: Engine, reading: Reading, wanted: Wanted, pupil: tuple[Calibration, Parameters], teachers: Sequence[str]
) -> tuple[FileDigest, ...]:
    """Has each task of the pupil keep what its teacher says, the first that of the first task; returns each one's name
    with a digest of that. A teacher is a model directory, or in a state of adapters the name, path, key or record
    number of a model. The pupil's model, which `Parameters` finds, has other weights then.

    Raises Misconfigured for a teacher that is neither, and where there is not one for each task.
    """
    losses, held = pupil
    if len(teachers) != len(losses.dealt):
        raise Misconfigured(f"teachers: one for each task; there are {len(teachers)} for {len(losses.dealt)}")
    found = []
    for number, name in enumerate(teachers):
        if (Path(name) / "config.json").is_file():
            told = losses.teach(number, load(wanted, Path(name), engine.device))
        else:
            alone = _alone(engine, reading, name)
            alone.settle(engine.executor, silent)
            scoring.fill(held, engine.base, alone, engine.executor)
            told = losses.teach(number)
        found.append(FileDigest(Path(name).name, told))
    return tuple(found)


def _alone(engine: Engine, reading: Reading, name: str) -> Reading:
    """One model of a state of adapters as it is by itself."""
    if not isinstance(reading, BlockReading):
        raise Misconfigured(
            f"teacher {name}: no model directory with a config.json, and {reading.state.path} keeps no model by itself"
        )
    view = ReadView(rule="task-arithmetic", scale="1", only=(name,), weights={name: 1.0})
    found = BlockReading(engine.state, engine.rule, reading.commit.seq, view, ReadOptions("number", 1.0))
    if len(found.chosen) != 1:
        raise Misconfigured(f"teacher {name}: {len(found.chosen)} models are called so; name one by its key")
    return found
