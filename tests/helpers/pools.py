"""States of the world of `tests.helpers.quadratic` with candidates that wait, and what the tests of rounds ask of
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from continual import api, making
from continual.config import CalibrationSettings, Settings
from continual.engine.engine import Engine
from continual.hub import Hub
from continual.objectives import calibration
from continual.objectives.wanted_losses import Wanted
from continual.selection import Round
from continual.selection.in_memory import ModelInMemory
from continual.state.entries import SelectEntry
from continual.state.parts import MemberFate
from tests.helpers import models, quadratic

QUERY = "model.layers.0.self_attn.q_proj.weight"


def wanted(objective: str, rows: tuple[Path, ...] = (), heads: tuple[Path, ...] = (), **settings: Any) -> Wanted:
    """Which losses, with these settings of a calibration."""
    return Wanted(objective, rows, heads, CalibrationSettings.model_validate(settings))


class Stopped(Exception):
    """Raised in the middle, as a kill would."""


def opened(
    state: Path,
    base: Path,
    rule: str = "mean",
    *,
    on_step: Callable[[str], None] | None = None,
    client: Hub | None = None,
    **settings: Any,
) -> api.Merge:
    if not state.exists():
        making.init(base, state, making.Recipe(rule=rule))
    asked = {
        "select": "relevance",
        "objective": "tests.helpers.quadratic:make",
        "max_base_ratio": 10.0,
        "device": "cpu",
        "state": state,
    }
    rounds = {"batch": quadratic.ROWS, **settings.pop("rounds", {})}  # all rows of a task at once
    return api.Merge(Settings(**{**asked, **settings, "rounds": rounds}), write=True, client=client, on_step=on_step)


def fill(merge: api.Merge, *candidates: Path) -> None:
    for path in candidates:
        assert merge.fold(path).fate == "deferred"


def rows(found: Round) -> dict[str, MemberFate]:
    assert len({row.key for row in found.rows}) == len(found.rows), "a member has two rows"
    return {row.name: row for row in found.rows}


def table(merge: api.Merge) -> tuple[MemberFate, ...]:
    """The last round's table, as the record has it."""
    return next(c.entry for c in reversed(merge.state.ledger.log) if isinstance(c.entry, SelectEntry)).scores


def names(merge: api.Merge) -> list[str]:
    return [c.entry.candidate.name for c in merge.state.ledger.folds()]


def waits(merge: api.Merge) -> list[str]:
    return [w.candidate.name for w in merge.pool().values()]


def bits(merge: api.Merge) -> dict[tuple[str, str], bytes]:
    slots = merge.state.format.slots
    return {(n, s): merge.state.read(n, s).tobytes() for n in slots for s in slots[n]}


def files(state: Path) -> dict[str, bytes]:
    return {str(p.relative_to(state)): p.read_bytes() for p in state.rglob("*") if p.is_file() and p.name != "lock"}


def adapter(base: Path, name: str) -> Path:
    """A LoRA adapter of two projections, in PEFT's layout."""
    place = base.parent / "pool" / name
    place.mkdir()
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for layer, inner in ((0, "self_attn.q_proj"), (1, "mlp.up_proj")):
        out, width = models.SHAPES[f"model.layers.{layer}.{inner}.weight"]
        module = f"base_model.model.model.layers.{layer}.{inner}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, width, generator=random) * 0.1
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2, generator=random) * 0.1
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def half(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.bfloat16)


def plainly(base: Path, path: Path) -> dict[str, Tensor]:
    """A task vector in float64, by what the formats say."""
    origin = load_file(base / "model.safetensors")
    if (path / "adapter_model.safetensors").exists():
        found = {}
        factors = load_file(path / "adapter_model.safetensors")
        for name in (n for n in factors if n.endswith("lora_A.weight")):
            product = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
            found[name.removeprefix("base_model.model.").replace("lora_A.", "")] = 3.0 * product
        return found
    tuned = load_file(path / "model.safetensors")
    return {n: t.double() - origin[n].to(t.dtype).double() for n, t in tuned.items()}


def objective(base: Path, seed: int = 0) -> Callable[[dict[str, Tensor]], Tensor]:
    """The loss on the driving rows as a function of the parameters, in the dtype of these."""
    loaded = calibration.load(wanted("tests.helpers.quadratic:make", seed=seed), base, torch.device("cpu"))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        theta = quadratic.flat(parameters)
        parts = []
        for dealt in loaded.dealt:
            task: Any = dealt.task
            signs, wanted = task.signs[dealt.drive].to(theta.dtype), task.wanted[dealt.drive].to(theta.dtype)
            parts.append((0.5 * (signs @ theta - wanted).square()).mean())
        return torch.stack(parts).mean()

    return loss


def loaded(merge: api.Merge, engine: Engine | None = None, *, by_layer: bool = False) -> ModelInMemory:
    engine = engine or merge.engine
    losses = calibration.load(merge.asked().calibration, engine.weights.checkpoint.directory, torch.device("cpu"))
    return ModelInMemory(engine, losses, by_layer=by_layer)
