"""An export takes of an earlier one what did not change, and has the bytes of one that was made whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.publish import folder
from continual.publish.earlier import TensorCounts, taken_in
from continual.publish.folder import Target
from continual.service.outgoing import OutPlan
from continual.service.publishing import put
from continual.service.release import public
from tests.helpers import adapter_states, adapters, models

FIRST, SECOND = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"


def changing(base: Path, directory: Path, seed: int, *names: str) -> Path:
    """A fine-tune in which only these tensors are others."""
    random = torch.Generator().manual_seed(seed)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name] += 0.01 * torch.randn(tensors[name].shape, generator=random)

    return models.fine_tune(base, directory, seed, size=0.0, change=change)


def state(place: Path, rule: str, scale: str | None = "1.0") -> tuple[Path, api.Merge]:
    base = models.base(place / "base")
    making.init(base, place / "state", making.Recipe(rule=rule, scale=scale))
    return base, api.Merge(Settings(state=place / "state"), write=True)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def counts(directory: Path) -> TensorCounts:
    return taken_in(folder.provenance_in(directory))


@pytest.mark.parametrize("rule", ["task-arithmetic", "mean", "ties", "magmax", "opcm", "iso-c", "tsv-m", "gram"])
def test_the_bytes_are_those_of_a_whole_export(tmp_path: Path, rule: str) -> None:
    base, merge = state(tmp_path, rule)
    with merge:
        assert merge.fold(changing(base, tmp_path / "one", 1, FIRST, "model.norm.weight")).fate == "folded"
        merge.export(tmp_path / "1")
        for number, names in enumerate([(SECOND,), (SECOND,), (FIRST, SECOND)], 2):
            assert merge.fold(changing(base, tmp_path / f"ft-{number}", number, *names)).fate == "folded"
            found = merge.export(Target(tmp_path / f"{number}", earlier=tmp_path / f"{number - 1}"))
            assert weights(found) == weights(merge.export(tmp_path / f"whole-{number}"))
            assert counts(found).taken >= len(models.SHAPES) - 3
            assert counts(tmp_path / f"whole-{number}").taken == 0


def test_only_what_a_fold_touched_is_made(tmp_path: Path) -> None:
    base, merge = state(tmp_path, "task-arithmetic")
    with merge:
        merge.fold(models.fine_tune(base, tmp_path / "all", 1))
        first = merge.export(tmp_path / "first")
        merge.fold(changing(base, tmp_path / "two", 2, FIRST, SECOND))
        second = merge.export(Target(tmp_path / "second", earlier=first))
        total = sum(spec.nbytes for spec in merge.base.specs)
    assert counts(second) == TensorCounts(2, 2 * 48 * 16 * 4, 9, total - 2 * 48 * 16 * 4)


def test_an_edited_or_damaged_export_is_not_believed(tmp_path: Path) -> None:
    base, merge = state(tmp_path, "task-arithmetic")
    with merge:
        merge.fold(models.fine_tune(base, tmp_path / "all", 1))
        first = merge.export(tmp_path / "first")
        whole = weights(first)
        file = first / "model.safetensors"
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        second = merge.export(Target(tmp_path / "second", earlier=first))
        assert weights(second) == whole
        assert (counts(second).made, counts(second).taken) == (1, 10)
        file.write_bytes(whole[:-100])
        assert weights(merge.export(Target(tmp_path / "third", earlier=first))) == whole
        file.unlink()
        assert counts(merge.export(Target(tmp_path / "fourth", earlier=first))).taken == 0
        (first / "continual.json").write_text('{"weights": {"model.safetensors": ["1 2", 3]}}')
        assert counts(merge.export(Target(tmp_path / "fifth", earlier=first))).taken == 0
        assert counts(merge.export(Target(tmp_path / "sixth", earlier=tmp_path / "none"))).taken == 0
        file.write_bytes(b"edited")
        for number, (name, start) in enumerate(
            [("\0", "0"), ("\ud800", "0"), (file.name, "9" * 30), (file.name, "-9")]
        ):
            said = json.loads((second / "continual.json").read_text())
            rows = [line.split() for line in said["weights"].pop(file.name)]
            said["weights"][name] = [" ".join([start, *row[1:]]) for row in rows]
            (first / "continual.json").write_text(json.dumps(said))
            assert counts(merge.export(Target(tmp_path / f"hostile-{number}", earlier=first))).taken == 0
    assert weights(second) == whole, "nothing is shared"


def test_another_scale_dtype_or_cut_into_shards_is_seen(tmp_path: Path) -> None:
    base, merge = state(tmp_path, "task-arithmetic")
    with merge:
        merge.fold(changing(base, tmp_path / "one", 1, FIRST))
        first = merge.export(tmp_path / "first")
        half = merge.export(Target(tmp_path / "half", dtype="F16", earlier=first))
        assert counts(half).taken == 0
        shards = merge.export(Target(tmp_path / "shards", shard_size=4000, earlier=first))
        assert counts(shards).made == 0
        plain = merge.export(Target(tmp_path / "plain", shard_size=4000))
        names = [file.name for file in plain.glob("*.safetensors")]
        assert len(names) > 1
        assert all((shards / name).read_bytes() == (plain / name).read_bytes() for name in names)
        merge.rescale("0.5")
        scaled = merge.export(Target(tmp_path / "scaled", earlier=first))
        assert weights(scaled) == weights(merge.export(tmp_path / "whole"))
    assert (counts(scaled).made, counts(scaled).taken) == (1, 10)


@pytest.mark.parametrize("rule", ["task-arithmetic", "iso-c", "opcm"])
def test_a_state_of_adapters_makes_what_an_adapter_touched(tmp_path: Path, rule: str) -> None:
    base = models.base(tmp_path / "base")
    with adapter_states.opened(tmp_path / "state", base, name=rule) as merge:
        merge.rescale("1.0")
        merge.fold(adapters.lora(tmp_path / "q", base, 1, modules=["q_proj"]))
        merge.fold(adapters.lora(tmp_path / "q2", base, 2, modules=["q_proj"]))
        first = merge.export(tmp_path / "first")
        merge.fold(adapters.lora(tmp_path / "down", base, 3, modules=["down_proj"]))
        second = merge.export(Target(tmp_path / "second", earlier=first))
        assert weights(second) == weights(merge.export(tmp_path / "whole"))
        found = merge.export(Target(tmp_path / "again", earlier=second))
    assert counts(found).made == 0
    assert counts(second).made == (4 if rule == "opcm" else 2)  # opcm goes by the order of all models


def test_what_follows_current_takes_what_was_there(tmp_path: Path) -> None:
    base, merge = state(tmp_path, "task-arithmetic")
    with merge:
        out = OutPlan(merge.settings.release, tmp_path / "current")
        merge.fold(models.fine_tune(base, tmp_path / "all", 1))
        put(merge, out, merge.head)
        merge.fold(changing(base, tmp_path / "one", 2, FIRST))
        found = put(merge, out, merge.head)
        assert found is not None
        assert weights(found.directory) == weights(merge.export(tmp_path / "whole"))
        assert counts(found.directory)[::2] == (1, 10)
        assert not {"made", "weights"} & json.loads(public(found.directory / "continual.json")).keys()
