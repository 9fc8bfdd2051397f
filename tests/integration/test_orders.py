"""Folds by orders that went through bytes, as those to other machines do: the same bits as in one process, for every
kind of rule and of state; nothing but receipts comes back; what a stray attempt writes touches nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.engine import block_orders, fold_orders
from continual.errors import Misconfigured, Retry
from continual.executors.contract import silent
from continual.rules import ReadOptions
from continual.state import State
from continual.state.attempts import SUFFIX, Attempt
from tests.helpers import adapters, models
from tests.helpers.posted import Posted

RULES: dict[str, dict[str, object]] = {
    "mean": {},
    "opcm": {},
    "ties": {"before": [{"name": "trim"}]},
    "tsv-m": {},
    "gram": {},
    "fisher": {},
    "magmax": {"before": [{"name": "drop", "rate": 0.5}]},
    "task-arithmetic": {"before": [{"name": "trim"}]},
}
"""One of each kind: element by element, by matrices, with ranks, with passes over the model, with values beside the
weights, with random choices."""
SHAPES = {
    **models.SHAPES,
    "model.layers.0.mlp.experts.down_proj": (3, 8, 16),
    "model.scale": (),
    "model.none.weight": (0, 16),
    "model.odd[name]/x y.weight": (3, 5),
}


def _still_open(directory: Path) -> list[str]:
    """Files below a directory that this process has open."""
    links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return [file for file in (os.readlink(link) for link in links if link.is_symlink()) if str(directory) in file]


class Sent(api.Merge):
    """A merge whose work is done by orders."""

    posted = Posted()

    @property
    def executor(self) -> Posted:  # type: ignore[override]
        return self.posted


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base", shapes=SHAPES)


def _settings(state: Path) -> Settings:
    return Settings(state=state, max_base_ratio=100.0, max_mean_ratio=1e6)


def _made(state: Path, base: Path, name: str, width: int | None = None) -> Path:
    making.init(base, state, making.Recipe(name, RULES.get(name, {}), width=width))
    return state


def _files(state: Path) -> dict[str, bytes]:
    """What the generation in force has."""
    with State.open(state) as found:
        generation = state / "generations" / str(found.ledger.head.generation)
    return {str(path.relative_to(generation)): path.read_bytes() for path in generation.rglob("*") if path.is_file()}


def _tunes(tmp_path: Path, base: Path) -> list[Path]:
    def untouched(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = load_file(base / "model.safetensors")["model.norm.weight"]

    found = [models.fine_tune(base, tmp_path / f"tune-{n}", n, change=untouched) for n in range(2)]
    for number, one in enumerate(found):
        models.ship(one, number)
    return found


@pytest.mark.parametrize("name", RULES)
def test_the_same_bits_as_in_one_process(tmp_path: Path, base: Path, name: str) -> None:
    tunes, found = _tunes(tmp_path, base), {}
    for kind in (api.Merge, Sent):
        state = _made(tmp_path / kind.__name__, base, name)
        before = Sent.posted.orders
        with kind(_settings(state), write=True) as merge:
            for tune in tunes:
                outcome = merge.fold(tune)
                assert outcome.fate == "folded", outcome.message
        assert (Sent.posted.orders > before) == (kind is Sent)
        found[kind] = _files(state)
        assert sorted(path.name for path in (state / "generations").iterdir() if path.name.endswith(SUFFIX)) == []
    assert found[Sent] == found[api.Merge]
    assert Sent.posted.answers < 1 << 20, "counts of a pass are the largest"


def test_the_same_bits_in_a_state_of_adapters(tmp_path: Path) -> None:
    """Of which some blocks are cut."""
    base = models.base(tmp_path / "base")
    modules = (("q_proj", "down_proj"), ("q_proj",), ("up_proj", "q_proj"))
    loras = [adapters.lora(tmp_path / f"lora-{i}", base, i, rank=6, modules=m) for i, m in enumerate(modules)]
    found = {}
    for kind in (api.Merge, Sent):
        state = _made(tmp_path / kind.__name__, base, "task-arithmetic", 8)
        with kind(_settings(state), write=True) as merge:
            for lora in loras:
                outcome = merge.fold(lora)
                assert outcome.fate == "folded", outcome.message
        found[kind] = _files(state)
    assert found[Sent] == found[api.Merge]


def test_what_is_refused_elsewhere_is_refused(tmp_path: Path, base: Path) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")

    state = _made(tmp_path / "state", base, "mean")
    with Sent(_settings(state), write=True) as merge:
        outcome = merge.fold(models.fine_tune(base, tmp_path / "nan", 1, change=broken))
        assert (outcome.fate, outcome.reason) == ("refused", "non-finite")
        assert list((state / "generations").iterdir()) == []


def test_a_stray_attempt_touches_nothing(tmp_path: Path, base: Path) -> None:
    """A try that was believed to be dead still writes when the fold has ended: nothing of it is in the state, and the
    next finds no directory."""
    state, tune = _made(tmp_path / "state", base, "mean"), models.fine_tune(base, tmp_path / "tune", 1)
    stray: list[Attempt] = []
    with api.Merge(_settings(state), write=True) as merge:
        begin = merge.state.begin

        def with_a_stray(*args: object, **named: object) -> object:
            transaction = begin(*args, **named)  # type: ignore[arg-type]
            handed = transaction.hand_out()
            stray.append(Attempt(handed, handed.generation()))
            return transaction

        merge.state.begin = with_a_stray  # type: ignore[method-assign, assignment]
        assert merge.fold(tune).fate == "folded"
        merge.state.begin = begin  # type: ignore[method-assign]
        before = _files(state)
        name, spec = next(iter(merge.state.format.slots.items()))
        slot = next(iter(spec))
        with pytest.raises(Retry):
            stray[0].write(name, slot, merge.state.read(name, slot))
        assert _files(state) == before
        assert merge.state.generations() == [merge.state.ledger.head.generation]
    with State.open(state, write=True) as again:
        assert again.orphans == ()


@pytest.mark.parametrize("which", ["tune", "base"])
@pytest.mark.parametrize(("size", "said"), [(None, "another file"), (1000, "cut off, as this machine sees it")])
def test_a_file_that_is_another_on_the_other_machine_is_told(
    tmp_path: Path, base: Path, which: str, size: int | None, said: str
) -> None:
    """As where a folder is not shared and something else lies at its path, or where it is being written anew: what is
    cut off then is not refused for ever."""
    state, tune = _made(tmp_path / "state", base, "mean"), models.fine_tune(base, tmp_path / "tune", 1)

    class Elsewhere(Sent):
        posted = Posted()

    seen = Elsewhere.posted.map

    def changed(tasks: object) -> object:
        file = tmp_path / which / "model.safetensors"
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:size])
        return seen(tasks)  # type: ignore[arg-type]

    Elsewhere.posted.map = changed  # type: ignore[method-assign, assignment]
    with Elsewhere(_settings(state), write=True) as merge, pytest.raises(Retry, match=said):
        merge.fold(tune)
    assert _still_open(tmp_path) == []
    with State.open(state, write=True) as again:
        assert again.ledger.head.seq == 0
        assert list((state / "generations").iterdir()) == []


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_worker_without_the_device_closes_what_it_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def none(name: str) -> None:
        raise Misconfigured(f"there is no {name} here")

    base = models.base(tmp_path / "base")
    state = _made(tmp_path / "state", base, "task-arithmetic", 8 if kind == "adapter" else None)
    if kind == "adapter":
        tune = adapters.lora(tmp_path / "tune", base, 1, rank=6, modules=("q_proj",))
    else:
        tune = models.fine_tune(base, tmp_path / "tune", 1)
    monkeypatch.setattr(fold_orders, "pick_device", none)
    monkeypatch.setattr(block_orders, "pick_device", none)
    with Sent(_settings(state), write=True) as merge, pytest.raises(Misconfigured, match="there is no cpu here"):
        merge.fold(tune)
    assert _still_open(tmp_path) == []


def test_a_state_that_the_other_machine_does_not_see_is_told(tmp_path: Path, base: Path) -> None:
    """Its mount is gone, say: no reason for a daemon to halt."""
    state, tunes = _made(tmp_path / "state", base, "mean"), _tunes(tmp_path, base)

    class Elsewhere(Sent):
        posted = Posted()

    with Elsewhere(_settings(state), write=True) as merge:
        merge.fold(tunes[0])
        generation, seen = state / "generations" / str(merge.state.ledger.head.generation), Elsewhere.posted.map

        def hidden(tasks: object) -> object:
            generation.rename(tmp_path / "hidden")
            yield from seen(tasks)  # type: ignore[arg-type]

        Elsewhere.posted.map = hidden  # type: ignore[method-assign, assignment]
        with pytest.raises(Retry, match=f"{generation} is not there on this machine: .*nothing was settled"):
            merge.fold(tunes[1])
        (tmp_path / "hidden").rename(generation)
        Elsewhere.posted.map = seen  # type: ignore[method-assign]
        assert merge.fold(tunes[1]).fate == "folded"


def test_a_merge_is_measured_by_orders(tmp_path: Path, base: Path) -> None:
    """Its length is what one process finds, bit for bit; so with what no record names, which is measured here."""
    state = _made(tmp_path / "state", base, "tsv-m")
    with api.Merge(_settings(state), write=True) as merge:
        for tune in _tunes(tmp_path, base):
            assert merge.fold(tune).fate == "folded"
    found, before = {}, Sent.posted.orders
    for kind in (api.Merge, Sent):
        with kind(_settings(state)) as merge:
            reading = merge.reading(options=ReadOptions.from_mapping({"policy": "norm", "value": 1.0}))
            found[kind] = reading.measure(merge.executor, silent)
    assert found[Sent] == found[api.Merge] > 0.0
    assert Sent.posted.orders > before


def test_paths_may_be_relative(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _made(tmp_path / "state", base, "mean")
    models.fine_tune(base, tmp_path / "tune", 1)
    monkeypatch.chdir(tmp_path)
    with Sent(_settings(Path("state")), write=True) as merge:
        assert merge.fold(Path("tune")).fate == "folded"
