"""States that keep adapters as they are, on real files: what is read equals what the same rule folds densely, for any
of the models; nothing of the base is read; what did not change is not written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.engine.blocks import layer_of
from continual.engine.views import ReadView
from continual.errors import Misconfigured, Retry
from continual.publish.folder import cut_in
from continual.publish.lora import LoraTarget
from continual.rules import ReadOptions, rule
from continual.service.control.acting import act
from continual.service.control.requests import RollbackRequest
from continual.state import State
from continual.state.entries import ScaleEntry
from continual.state.transaction import MARGIN
from tests.helpers import adapters, models
from tests.helpers.adapter_states import folded, merged, opened, same
from tests.helpers.command import run
from tests.helpers.streams import FOLDING

READ = [name for name in FOLDING if rule(name).needs.shipped is None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """With a scalar, and tensors without an element."""
    odd = {"model.scale": (), "model.none.weight": (0, 16), "model.no.weight": (16, 0), "model.nothing": (0,)}
    return models.base(tmp_path / "base", shapes={**models.SHAPES, **odd})


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> list[Path]:
    """Five adapters: some of all modules, some of few, of ranks 1 to 6."""
    ranks = (4, 1, 6, 2, 3)
    modules = (("q_proj", "down_proj"), ("q_proj",), ("up_proj", "q_proj"), ("down_proj",), ("q_proj", "up_proj"))
    return [
        adapters.lora(tmp_path / f"lora-{i}", base, i, rank=r, modules=m)
        for i, (r, m) in enumerate(zip(ranks, modules, strict=True))
    ]


def _header(model: Path) -> int:
    """Bytes of the header of an adapter's file."""
    with open(model / "adapter_model.safetensors", "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_what_the_rule_folds_densely(tmp_path: Path, base: Path, tuned: list[Path], name: str) -> None:
    blocks = folded(tmp_path / "blocks", base, tuned)
    dense = folded(tmp_path / "dense", base, tuned, width=None, name=name)
    same(merged(blocks, ReadView(rule=name)), merged(dense))
    some = folded(tmp_path / "some", base, [tuned[0], tuned[2], tuned[4]], width=None, name=name)
    same(merged(blocks, ReadView(rule=name, only=("lora-0", "lora-[24]"))), merged(some))
    same(merged(blocks, ReadView(rule=name, without=("lora-1", "4"))), merged(some))


def test_weights_are_those_of_the_view_or_of_the_fold(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    blocks = folded(tmp_path / "blocks", base, tuned[:2])
    view = ReadView(rule="task-arithmetic", scale="1", weights={"lora-1": 0.25})
    first, second = (
        merged(blocks, ReadView(rule="task-arithmetic", scale="1", only=(n,))) for n in ("lora-0", "lora-1")
    )
    same(merged(blocks, view), {name: value + 0.25 * second[name] for name, value in first.items()})
    with pytest.raises(Misconfigured, match="opcm reads every model with weight 1"):
        merged(blocks, ReadView(rule="opcm", weights={"lora-1": 0.25}))


def test_one_model_is_given_back(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    """Exactly the product of its factors, to the last bits of float32."""
    blocks = folded(tmp_path / "blocks", base, tuned)
    expected = adapters.task_vectors(base, tuned[2])[0]
    found = merged(blocks, ReadView(rule="mean", only=("lora-2",)))
    for name, value in found.items():
        wanted = expected.get(name, torch.zeros_like(value))
        largest = max(wanted.abs().reshape(-1).tolist(), default=0.0)
        torch.testing.assert_close(value, wanted, rtol=0, atol=2e-7 * (largest + 1e-9))


def test_nothing_of_the_base_is_read(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    """Its weights can be gone after init, and are missed by a whole model alone."""
    state = folded(tmp_path / "state", base, tuned[:1])
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").unlink()
    folded(state, base, tuned[1:])
    with opened(state, base) as merge:
        assert merge.plan(tuned[0]).reason == "known"
        with pytest.raises(Misconfigured):
            merge.export(tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
        (base / "model.safetensors").write_bytes(weights)
        merge.export(tmp_path / "whole", view=ReadView(only=("lora-3",), rule="mean"))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "whole/model.safetensors")
    expected = adapters.task_vectors(base, tuned[3])[0]
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] + expected.get(name, torch.zeros_like(value)), rtol=0, atol=1e-6)


def test_a_fold_writes_its_own_columns_alone(tmp_path: Path, base: Path) -> None:
    """Of a layer that the adapter changes the chunks before its own are links; of others all files are."""
    state = tmp_path / "state"
    first = adapters.lora(tmp_path / "a", base, 1, rank=16)
    second = adapters.lora(tmp_path / "b", base, 2, rank=3, modules=("q_proj",))
    folded(state, base, [first])
    with State.open(state) as now:
        before = now.generation_of(now.ledger.head)
        assert before is not None
    folded(state, base, [second])
    with State.open(state) as now:
        after = now.generation_of(now.ledger.head)
        assert after is not None
        assert now.generation_bytes() < now.format.generation_bytes
    linked = {
        path.relative_to(after.directory).as_posix(): path.stat().st_ino
        == (before.directory / path.relative_to(after.directory)).stat().st_ino
        for path in after.directory.rglob("c.*")
        if (before.directory / path.relative_to(after.directory)).exists()
    }
    written = {path.relative_to(after.directory).as_posix() for path in after.directory.rglob("c.*")} - linked.keys()
    queries = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    place = after.form.layout.place
    assert written == {place(name, slot).files()[1] for slot in "uv" for name in queries}
    anew = {file for file, is_link in linked.items() if not is_link}
    assert anew == {place(name, "columns").files()[0] for name in queries}
    assert not (after.directory / place("model.norm.weight", "u").files()[0]).exists()


def _files(state: State) -> dict[int, int]:
    """Inodes of the chunks of the newest generation, and what they take on the disk."""
    generation = state.generation_of(state.ledger.head)
    found = [] if generation is None else [path.stat() for path in generation.directory.rglob("c.*")]
    return {one.st_ino: 512 * one.st_blocks for one in found}


def test_blocks_are_cut_when_there_is_no_room_and_it_is_said(
    tmp_path: Path, base: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the models that were there. A fold asks for the room on the disk that it takes."""
    state = tmp_path / "state"
    disk = shutil.disk_usage(tmp_path)
    cuts, planned, told = [], [], set[str]()
    with opened(state, base, width=8) as merge:
        for model in tuned:
            plan = merge.plan(model)
            assert plan.read_bytes == (model / "adapter_model.safetensors").stat().st_size - _header(model)
            planned.append("are cut to the width of 8" in plan.message)
            whole, there = merge.fullness(), _files(merge.state)
            with monkeypatch.context() as patch:
                patch.setattr("shutil.disk_usage", lambda _, by=plan: disk._replace(free=MARGIN + by.disk_bytes - 1))
                with pytest.raises(Retry, match="free some space"):
                    merge.fold(model)
                patch.setattr("shutil.disk_usage", lambda _, by=plan: disk._replace(free=MARGIN + by.disk_bytes))
                outcome = merge.fold(model)
            written = sum(size for inode, size in _files(merge.state).items() if inode not in there)
            assert written <= plan.disk_bytes
            assert written == plan.disk_bytes or planned[-1]
            assert outcome.report is not None
            assert outcome.report.bytes_read == plan.read_bytes
            cuts.append(outcome.report.numbers.cut)
            now = merge.fullness()
            assert whole is not None
            assert now is not None
            lost = {f"lora-{seq - 1}": now.models[seq] - share for seq, share in whole.models.items()}
            others = outcome.report.others
            assert others == pytest.approx({name: share for name, share in lost.items() if share > 1e-9})
            assert ("of the square of the length of others: lora-" in outcome.line()) == bool(others)
            told |= others.keys()
        assert "of its square cut off" in outcome.line()
        assert told == {"lora-0", "lora-2"}
        generation = merge.state.generation_of(merge.state.ledger.head)
        assert generation is not None
        columns = layer_of(generation, "model.layers.0.self_attn.q_proj.weight").columns
    assert {number: where.stop - where.start for number, where in columns.models.items()} == {1: 2, 2: 1, 3: 2, 5: 2}
    assert cuts[:2] == [0.0, 0.0]
    assert planned == [False, False, True, False, True]
    assert cuts[4] is not None
    assert 0.0 < cuts[4] < 1.0
    assert api.verify(state).findings == ()


@pytest.mark.parametrize("width", [2, 8, 64])
def test_an_export_says_what_was_cut_off_of_the_models_that_it_reads(
    tmp_path: Path, base: Path, tuned: list[Path], width: int
) -> None:
    """Its square is that of the distance between a model that is given back and the model; also where nothing of a
    layer is left."""
    state = folded(tmp_path / "state", base, tuned, width=width)
    shares = []
    for model in tuned:
        view = ReadView(rule="mean", only=(model.name,))
        with opened(state, base, write=False) as merge:
            report = merge.export_lora(LoraTarget(tmp_path / f"{model.name}-out", None), view)
            assert merge.explain(view).cut == cut_in(report.directory) == report.cut
        expected, back = (adapters.task_vectors(base, one)[0] for one in (model, report.directory))
        lost = sum(float((value - back.get(name, 0.0)).square().sum()) for name, value in expected.items())
        share = lost / sum(float(value.square().sum()) for value in expected.values())
        shares.append(share)
        assert [one.name for one in report.cut] == ([model.name] if share > 1e-6 else [])
        assert sum(one.cut for one in report.cut) == pytest.approx(share, abs=1e-5)
    assert (max(shares) > 0.01) == (width < 64)
    done = run("export", tmp_path / "whole", "--state", state)
    assert ("cut off to make room in the state, of the square of" in done.stdout) == (width < 64), done.stderr


def test_taking_a_model_out_leaves_what_the_others_give(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    state = folded(tmp_path / "state", base, tuned)
    before = merged(state, ReadView(rule="mean"))
    shutil.rmtree(tuned[1])  # its files are not needed
    with opened(state, base) as merge:
        plan = merge.look_unfold("lora-1")
        assert (plan.exact, plan.again, plan.read_bytes) == (True, (), 0)
        norms = [fold.entry.numbers.tau_norm for fold in merge.state.ledger.folds()]
        merge.unfold(plan)
        totals = merge.state.ledger.totals
        assert (totals.count, totals.weight) == (4, 4)
        assert totals.norm_sum == pytest.approx(sum(norms) - norms[1])
        assert [fold.entry.candidate.name for fold in merge.state.ledger.folds()] == [
            "lora-0",
            "lora-2",
            "lora-3",
            "lora-4",
        ]
    others = folded(tmp_path / "others", base, [tuned[0], *tuned[2:]])
    for name in ("opcm", "iso-c"):
        same(merged(state, ReadView(rule=name)), merged(others, ReadView(rule=name)))
    assert api.verify(state).findings == ()
    again = adapters.lora(tmp_path / "again", base, 9)
    folded(state, base, [again])  # it takes the number that is free
    with opened(state, base) as merge:
        assert [fold.entry.numbers.block for fold in merge.state.ledger.folds()] == [1, 3, 4, 5, 2]
        merge.state.rollback(5)
    same(merged(state, ReadView(rule="mean")), before)


def test_the_last_model_out_leaves_nothing(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    state = folded(tmp_path / "state", base, tuned[:1])
    with opened(state, base) as merge:
        merge.unfold(merge.look_unfold("lora-0"))
        assert merge.state.generation_bytes() == 0
        assert merge.state.ledger.totals.count == 0
    assert all(not bool(value.any()) for value in merged(state).values())
    assert api.verify(state).findings == ()


@pytest.mark.parametrize("width", [64, 8])
def test_two_states_become_one(tmp_path: Path, base: Path, tuned: list[Path], width: int) -> None:
    ours = folded(tmp_path / "ours", base, tuned[:2], width=width)
    theirs = folded(tmp_path / "theirs", base, tuned[2:], width=width, name="opcm")
    together = folded(tmp_path / "together", base, tuned, width=width)
    with opened(ours, base) as merge:
        before = {fold.entry.candidate.name for fold in merge.state.ledger.folds()}
        _, combined = merge.combine(theirs)
        assert combined is not None
        folds = merge.state.ledger.folds()
        assert [fold.entry.numbers.block for fold in folds] == [1, 2, 3, 4, 5]
        whole = merge.fullness()
        assert whole is not None
        lost = {fold.entry.candidate.name: whole.models[fold.entry.numbers.block or 0] for fold in folds}
        assert bool(combined.cut) == (width == 8)
        assert {name: combined.cut[name] for name in before if lost[name]} == pytest.approx(
            {name: lost[name] for name in before if lost[name]}
        )
    for name in ("iso-c", "opcm"):
        same(merged(ours, ReadView(rule=name)), merged(together, ReadView(rule=name)))
    assert api.verify(ours).findings == ()
    other = folded(tmp_path / "other", base, tuned[2:], width=32)
    with opened(ours, base) as merge, pytest.raises(Misconfigured, match="adapters at width 32"):
        merge.combine(other)


def test_the_rule_of_the_first_of_two_states_takes_the_weights_of_the_other(
    tmp_path: Path, base: Path, tuned: list[Path]
) -> None:
    theirs = tmp_path / "theirs"
    making.init(base, theirs, making.Recipe(rule="mean", width=64))
    with api.Merge(Settings(state=theirs, max_base_ratio=100.0, weight="0.5"), write=True) as merge:
        for model in tuned[2:]:
            merge.fold(model)
        key = merge.state.ledger.folds()[0].entry.candidate.key
        read = ReadOptions("number", weights=((key, 3.0),))
        merge.state.record(ScaleEntry(read=read.to_mapping(), message="as tune --what weights leaves it"))
    for name in ("opcm", "isotropic", "mean"):
        made = "tsv-m" if name == "isotropic" else name
        with opened(folded(tmp_path / name, base, tuned[:2], name=made), base) as merge:
            merge.rescale(rule=name)
            if name == "mean":
                merge.combine(theirs)
                weights = ReadView().chosen(merge.state, merge.state.ledger.head.seq)
                assert list(weights.values()) == [1.0, 1.0, 3.0, 0.5, 0.5]
            else:
                with pytest.raises(Misconfigured, match=f"weights other than 1, which {name} does not take"):
                    merge.combine(theirs)


def test_no_weight_comes_in_that_the_rule_which_reads_does_not_take(
    tmp_path: Path, base: Path, tuned: list[Path]
) -> None:
    """Nothing could be read of the state after it, and a daemon would not start."""
    state = folded(tmp_path / "state", base, tuned[:1], name="tsv-m")
    with api.Merge(Settings(state=state, max_base_ratio=100.0, weights={"lora-1": 2.0}), write=True) as merge:
        merge.rescale(rule="isotropic")
        found = merge.fold(tuned[1])
        assert (found.fate, found.reason) == ("refused", "weight"), "it stops no daemon"
        assert "isotropic reads every model with weight 1, and lora-1 has the weight" in found.message
        merge.rescale(rule="tsv-w")
        merge.retry("lora-1")
        assert merge.fold(tuned[1]).fate == "folded"
        for name in ("isotropic", "opcm"):
            with pytest.raises(Misconfigured, match=f"{name} reads every model with weight 1, and lora-1 has"):
                merge.rescale(rule=name)
        assert merge.scale().rule == "tsv-w"
        assert merge.explain(ReadView(rule="opcm", weights={"*": 1.0})).models
        back = merge.state.ledger.head.seq
        merge.unfold(merge.look_unfold("lora-1"))
        merge.rescale(rule="isotropic")
        with pytest.raises(Misconfigured, match="lora-1 has the weight 2"):
            act(merge, RollbackRequest(seq=back), lambda _: None)
        assert len(merge.state.ledger.folds()) == 1


def test_the_same_adapter_in_another_place_is_a_duplicate(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    state = folded(tmp_path / "state", base, tuned[:1])
    shutil.copytree(tuned[0], tmp_path / "copy")
    with opened(state, base) as merge:
        assert merge.fold(tmp_path / "copy").fate == "duplicate"


def test_a_state_of_whole_tensors_has_no_views(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    state = folded(tmp_path / "state", base, tuned[:1], width=None)
    with opened(state, base) as merge, pytest.raises(Misconfigured, match="continual init --adapters"):
        merge.reading(view=ReadView(only=("lora-0",)))


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (ReadView(only=("carol",)), "only = carol: no model of the merge is called so; in it are lora-0, 1"),
        (ReadView(without=("lora-0",), weights={"lora-0": 2.0}), "weight = lora-0: 'only' and 'without' leave that"),
        (ReadView(without=("*",)), "no model is left to be read"),
        (ReadView(rule="no-such"), "unknown rule"),
        (ReadView(rule="fisher"), "cannot be read by fisher"),
        (ReadView(rule="mean", scale="spread"), "spread is for"),
        (ReadView(weights={"lora-0": -1.0}), "above 0"),
        (ReadView(weights={"lora-0": 1e40}), "from 1e-30 to 1e.30"),
        (ReadView(only=("1",)), "record 1 is of lora-0, and another model is called so"),
    ],
)
def test_views_that_cannot_be_read(tmp_path: Path, base: Path, tuned: list[Path], view: ReadView, said: str) -> None:
    state = folded(tmp_path / "state", base, [tuned[0], tuned[1].rename(tmp_path / "1")])
    with pytest.raises(Misconfigured, match=said):
        merged(state, view)


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    """LoRA of a convolution is out × rest, of an embedding the factors stand the other way round."""
    base = models.base(tmp_path / "base", shapes={"conv.weight": (6, 3, 2, 2), "embed.weight": (20, 8)})
    model = adapters.plain(
        tmp_path / "model",
        {
            "base_model.model.conv.lora_A.weight": torch.randn(2, 3, 2, 2),
            "base_model.model.conv.lora_B.weight": torch.randn(6, 2, 1, 1),
            "base_model.model.embed.lora_embedding_A": torch.randn(2, 20),
            "base_model.model.embed.lora_embedding_B": torch.randn(8, 2),
        },
        target_modules=["conv", "embed"],
    )
    expected = adapters.task_vectors(base, model)[0]
    state = folded(tmp_path / "state", base, [model])
    same(merged(state, ReadView(rule="task-arithmetic", scale="1")), expected, rtol=1e-6)


def test_the_bias_of_a_lora_is_one_column(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", shapes={"fc.weight": (5, 7), "fc.bias": (5,)})
    model = adapters.plain(
        tmp_path / "model",
        {
            "base_model.model.fc.lora_A.weight": torch.randn(2, 7),
            "base_model.model.fc.lora_B.weight": torch.randn(5, 2),
            "base_model.model.fc.lora_B.bias": torch.randn(5),
        },
        lora_bias=True,
        target_modules=["fc"],
    )
    expected = adapters.task_vectors(base, model)[0]
    state = folded(tmp_path / "state", base, [model, adapters.lora(tmp_path / "other", base, 1, modules=("fc",))])
    same(merged(state, ReadView(rule="task-arithmetic", scale="1", only=("model",))), expected, rtol=1e-6)
