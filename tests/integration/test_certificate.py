"""The proof that a model was taken out: it is checked from the bytes alone, it holds for what was subtracted, and no
forged one is believed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.removal import verifier
from continual.removal.verifier import Refused, encoded
from continual.state import names
from continual.state.entries import FoldEntry
from tests.helpers import adapters, hubs, models
from tests.helpers.command import machine, run
from tests.helpers.forgeries import Taken, bytes_of_the_state, digits, fields, places, records, swaps
from tests.loopback import serving

pytestmark = pytest.mark.slow

SHAPES = {n: s for n, s in models.SHAPES.items() if ".layers.1." not in n}
OFF = ["noise.act=off", "norms.act=off", "copies.act=off"]


def take_out(merge: api.Merge, name: str, tmp_path: Path, base: Path) -> Taken:
    with merge.state.lease():
        commit = merge.unfold(merge.look_unfold(name))
        merge.certify(commit.seq, tmp_path / f"{name}.json")
    certificate = json.loads((tmp_path / f"{name}.json").read_text())
    return Taken(certificate, merge.state.path, tmp_path / name, base)


def opened(tmp_path: Path, base: Path, rule: str, **settings: Any) -> api.Merge:
    making.init(base, tmp_path / "state", making.Recipe(rule))
    return api.Merge(Settings(state=tmp_path / "state", gates=OFF, **settings), write=True)


@pytest.mark.parametrize(
    ("rule", "weight", "dtypes"),
    [
        ("mean", 0.3, "float32 float32"),
        ("task-arithmetic", 3.0, "bfloat16 bfloat16"),
        ("iso-c", 1.0, "float32 bfloat16"),
        ("mean", 3.0, "bfloat16 float16"),
    ],
)
def test_what_was_subtracted_is_verified(tmp_path: Path, rule: str, weight: float, dtypes: str) -> None:
    ours, theirs = (getattr(torch, word) for word in dtypes.split())
    base = models.base(tmp_path / "base", shapes=SHAPES, dtype=ours)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: value.to(theirs) for name, value in tensors.items()}

    with opened(tmp_path, base, rule, weights={"b": weight}) as merge:
        for number, name in enumerate("abc"):
            outcome = merge.fold(models.fine_tune(base, tmp_path / name, number, change=narrow))
            assert outcome.fate == "folded", outcome.message
        found = take_out(merge, "b", tmp_path, base).verify()
        assert (found.tensors, found.empty) == (len(SHAPES), False)
        assert found.share < 1e-6
        folded = merge.state.ledger.get(2).of_kind(FoldEntry)
        assert found.taken == pytest.approx(weight * folded.numbers.tau_norm)
        take_out(merge, "a", tmp_path, base).verify()
        last = take_out(merge, "c", tmp_path, base)
        assert last.verify().empty


def test_names_rows_twins_and_what_stays_out(tmp_path: Path) -> None:
    """A prefix, a vocabulary of another size, a tied head, a tensor that the state carries, one that the base lacks."""
    config = {**models.CONFIG, "tie_word_embeddings": True}
    shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    base = models.base(tmp_path / "base", shapes=shapes)
    (base / "config.json").write_text(json.dumps(config))

    def other(tensors: dict[str, torch.Tensor]) -> None:
        named = {f"module.{name}": value for name, value in tensors.items()}
        named["module.model.embed_tokens.weight"] = named["module.model.embed_tokens.weight"][:30].clone()
        named["module.lm_head.weight"] = named["module.model.embed_tokens.weight"].clone()
        tensors.clear()
        tensors |= named

    making.init(base, tmp_path / "state", making.Recipe("mean", exclude=("model.norm.weight",)))
    settings = Settings(state=tmp_path / "state", gates=OFF, vocab="common-rows")
    with api.Merge(settings, write=True) as merge:
        for number, name in enumerate("ab"):
            outcome = merge.fold(models.fine_tune(base, tmp_path / name, number, change=other))
            assert outcome.fate == "folded", outcome.message
        taken = take_out(merge, "b", tmp_path, base)
    said = taken.certificate["tensors"]["model.embed_tokens.weight"]
    assert {said["from"], *said["twins"]} == {"module.model.embed_tokens.weight", "module.lm_head.weight"}
    assert "model.norm.weight" not in taken.certificate["tensors"]
    taken.verify()


def test_eight_folded_and_one_taken_out_is_as_if_it_had_never_been_folded(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", shapes=SHAPES)
    tunes = [models.fine_tune(base, tmp_path / f"ft-{number}", number) for number in range(8)]
    for rule in ("mean", "task-arithmetic"):
        merged = []
        for skipped in (None, 3):
            with opened(tmp_path, base, rule) as merge:
                for number, model in enumerate(tunes):
                    assert number == skipped or merge.fold(model).fate == "folded"
                if skipped is None:
                    taken = take_out(merge, "ft-3", tmp_path, base)
                    taken.verify()
                names = [spec.name for spec in merge.state.format.tensors]
                merged.append(torch.cat([merge.read(name).double().flatten() for name in names]))
            shutil.rmtree(tmp_path / "state")
        (tmp_path / "ft-3.json").unlink()
        assert float((merged[0] - merged[1]).norm() / merged[1].norm()) < 1e-6


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    work = tmp_path_factory.mktemp("taken")
    base = models.base(work / "base", shapes=SHAPES)
    with opened(work, base, "mean", weights={"ft-1": 0.5}) as merge:
        for number in range(3):
            merge.fold(models.fine_tune(base, work / f"ft-{number}", number))
        found = take_out(merge, "ft-1", work, base)
    models.base(work / "other", shapes=SHAPES, seed=9)
    return found


def test_a_hundred_forged_certificates_are_refused(tmp_path: Path, taken: Taken) -> None:
    taken.verify()
    kinds = [
        *digits(taken, 12),
        *fields(taken),
        *swaps(taken),
        *places(taken, tmp_path),
        *bytes_of_the_state(taken, tmp_path),
        *records(taken, tmp_path),
    ]
    assert len(kinds) >= 100, len(kinds)
    reasons = []
    for number, forged in enumerate(kinds):
        try:
            found = taken.verify(**forged)
        except (Refused, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reasons.append(str(error))
            continue
        pytest.fail(f"forgery {number} is believed: {found}")
    assert sum("beyond rounding" in reason for reason in reasons) >= 7, reasons
    taken.verify()


def test_the_script_runs_alone(tmp_path: Path, taken: Taken) -> None:
    """Without continual, and without torch."""
    script = tmp_path / "verifier.py"
    shutil.copyfile(verifier.__file__, script)
    certificate = tmp_path / "certificate.json"
    certificate.write_text(json.dumps(taken.certificate))
    words = ["--before", taken.state, "--after", taken.state, "--base", taken.base]

    def ran(model: Path) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, script, certificate, *words, "--model", model],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": ""},
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    code, said = ran(taken.model)
    assert (code, "verified: ft-1 was taken out of 7 tensors" in said) == (0, True), said
    code, said = ran(taken.model.parent / "ft-0")
    assert (code, said.startswith("NOT verified:")) == (1, True)
    certificate.write_text("[1]")
    assert ran(taken.model)[0] == 1
    assert not any(
        word in Path(verifier.__file__).read_text() for word in ("from continual", "import continual", "torch")
    )


@pytest.mark.parametrize("name", ["a.b", ".hidden/x", "__x", "zarr.json", "é %", "_x"])
def test_names_are_encoded_as_the_state_does(name: str) -> None:
    assert encoded(name) == names.encode(name)


def test_what_cannot_be_shown_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", shapes=SHAPES)
    for number, (recipe, word) in enumerate(
        (
            (making.Recipe("tsv-m"), "tsv-m keeps something else"),
            (making.Recipe("gram"), "gram keeps something else"),
            (making.Recipe("mean", {"before": [{"name": "trim"}]}), "transforms change task vectors"),
            (making.Recipe("mean", width=8), "keeps models apart"),
        )
    ):
        making.init(base, tmp_path / f"s{number}", recipe)
        done = run("unfold", "x", "--yes", "--certificate", tmp_path / "c.json", "--state", tmp_path / f"s{number}")
        assert (done.returncode, word in done.stderr) == (2, True), done.stderr
        assert not (tmp_path / "c.json").exists()


def test_a_fine_tune_from_the_hub(tmp_path: Path) -> None:
    """Its tensors are read from the Hub again; who checks it downloads that commit. The base may be there as well."""
    with serving() as hub:
        base = hubs.made(tmp_path, hub, shapes=SHAPES)
        tunes = [models.fine_tune(base, tmp_path / f"ft-{number}", number) for number in range(3)]
        with hubs.merge(tmp_path / "state", hub, gates=OFF) as merge:
            for tune in tunes:
                hubs.publish(hub, f"org/{tune.name}", tune)
                outcome = merge.fold(f"hf://org/{tune.name}")
                assert outcome.fate == "folded", outcome.message
            with merge.state.lease():
                commit = merge.unfold(merge.look_unfold("hf://org/ft-1"))
                tunes[1].rename(tmp_path / "downloaded")  # the Hub alone has it where it was
                certificate = merge.certify(commit.seq, tmp_path / "c.json")
        assert certificate["model"]["revision"] is not None
        taken = Taken(dict(certificate), tmp_path / "state", tmp_path / "downloaded", base)
        assert taken.verify().tensors == len(SHAPES)
        with hubs.merge(tmp_path / "state", hub, gates=OFF) as merge:
            hubs.publish(hub, "org/two", models.fine_tune(base, tmp_path / "two", 9))
            hub.commit("org/two", {"other.safetensors": (tunes[0] / "model.safetensors").read_bytes()})
            outcome = merge.fold("hf://org/two")
            assert outcome.fate == "folded", outcome.message
            with merge.state.lease():
                commit = merge.unfold(merge.look_unfold("hf://org/two"))
                with pytest.raises(Misconfigured, match=r"other\.safetensors lies beside it"):
                    merge.certify(commit.seq, tmp_path / "d.json")


def test_files_that_were_exchanged_since_are_not_certified(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", shapes=SHAPES)
    with opened(tmp_path, base, "mean") as merge:
        for number in range(2):
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{number}", number))
        with merge.state.lease():
            commit = merge.unfold(merge.look_unfold("ft-0"))
        weights = tmp_path / "ft-0" / "model.safetensors"
        tensors = load_file(weights)
        tensors["lm_head.weight"].view(torch.int32)[3, 3] ^= 1
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(Misconfigured, match="its files are not those any more that were folded as record 1"):
            merge.certify(commit.seq, tmp_path / "c.json")
        assert not (tmp_path / "c.json").exists()


def test_the_command_and_a_model_that_is_out_already(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", shapes=SHAPES)
    state = tmp_path / "state"
    with opened(tmp_path, base, "mean") as merge:
        for number in range(3):
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{number}", number))
    body = machine("unfold", "ft-1", "--yes", "--certificate", tmp_path / "c.json", "--state", state)
    certificate = json.loads((tmp_path / "c.json").read_text())
    assert certificate["after"]["seq"] == body["record"]["seq"] == 4
    done = run("unfold", "ft-1", "--certificate", tmp_path / "again.json", "--state", state)
    assert (done.returncode, "Wrote" in done.stdout) == (0, True), done.stderr
    assert json.loads((tmp_path / "again.json").read_text()) == certificate
    for file, word in ((tmp_path / "c.json", "is there already"), (tmp_path / "no" / "c.json", "no such directory")):
        done = run("unfold", "ft-0", "--yes", "--certificate", file, "--state", state)
        assert (done.returncode, word in done.stderr) == (2, True), done.stderr
    with api.open(state, write=True) as merge:
        assert [fold.seq for fold in merge.state.ledger.folds()] == [1, 3], "nothing was taken out"
        with pytest.raises(Misconfigured, match="record 3 subtracted no model"):
            merge.certify(3, tmp_path / "x.json")
        lora = adapters.lora(tmp_path / "lora", base, 1, modules=("q_proj",))
        assert merge.fold(lora).fate == "folded"
    for model, word in (("lora", "lora is an adapter"), ("two", "is in two files")):
        if model == "two":
            two = models.fine_tune(base, tmp_path / "two", 8)
            with api.open(state, write=True) as merge:
                assert merge.fold(two).fate == "folded"
            shutil.copyfile(two / "model.safetensors", two / "beside.safetensors")
        done = run("unfold", model, "--yes", "--certificate", tmp_path / "x.json", "--state", state)
        assert (done.returncode, word in done.stderr) == (2, True), done.stderr
    with api.open(state) as merge:
        assert [fold.entry.candidate.name for fold in merge.state.ledger.folds()][-2:] == ["lora", "two"]
