"""The proof that a model was taken out: it is checked from the bytes alone, it holds for what was subtracted, and no
forged one is believed."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.removal import verifier
from continual.removal.verifier import Refused, digest, encoded, verify
from continual.state import framing, names
from continual.state.entries import FoldEntry
from tests.helpers import adapters, models
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow

SHAPES = {n: s for n, s in models.SHAPES.items() if ".layers.1." not in n}
OFF = ["noise.act=off", "norms.act=off", "copies.act=off"]


class Taken(NamedTuple):
    """A model that was taken out: the certificate, and the directories that it is checked from."""

    certificate: dict[str, Any]
    state: Path
    model: Path
    base: Path

    def verify(self, **other: Any) -> verifier.Holding:
        given = {"certificate": self.certificate, "before": self.state, "after": self.state}
        return verify(**{**given, "model": self.model, "base": self.base, **other})


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


def signed(certificate: dict[str, Any]) -> dict[str, Any]:
    """As a forger writes it, who knows how its digest is made."""
    return certificate | {"digest": digest(certificate)}


def changed(certificate: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """With one value another one; `value` can be made of the old one."""
    found = copy.deepcopy(certificate)
    *above, last = path.split("/")
    place = found
    for key in above:
        place = place[key]
    place[last] = value(place[last]) if callable(value) else value
    return found


def digits(taken: Taken, count: int) -> Iterator[dict[str, Any]]:
    """A character of the file is another one, anywhere."""
    text = json.dumps(taken.certificate)
    drawn = random.Random(5)
    while count:
        place = drawn.randrange(len(text))
        other = drawn.choice("0123456789abcdef")
        if text[place] in "0123456789abcdef" and text[place] != other:
            count -= 1
            try:
                yield {"certificate": json.loads(text[:place] + other + text[place + 1 :])}
            except ValueError:
                count += 1


def fields(taken: Taken) -> Iterator[dict[str, Any]]:
    """A value is another one, and the digest of all is right."""
    names = list(taken.certificate["tensors"])
    hexadecimal = lambda old: ("0" if old[0] != "0" else "1") + old[1:]  # noqa: E731
    values: list[tuple[str, Any]] = [
        ("kind", "continual.removal/2"),
        ("state", hexadecimal),
        ("rule", "task-arithmetic"),
        ("options", {"include": ["x"]}),
        ("model/name", "ft-0"),
        ("model/revision", "0" * 40),
        ("model/digest", lambda old: old[:-1] + ("0" if old[-1] != "0" else "1")),
        ("model/weight", 0.25),
        ("model/weight", 1.0),
        ("model/weight", -0.5),
        ("model/weight", float("nan")),
        ("fold/seq", 1),
        ("before/seq", 2),
        ("after/seq", 3),
        ("after/seq", 10**9),
        ("before/generation", "../../../etc"),
        ("before/generation", hexadecimal),
        ("after/generation", hexadecimal),
        ("bound", lambda old: old * 10),
        ("bound", lambda old: old * 1.001),
        ("bound", float("nan")),
        ("extra", ["lm_head.weight"]),
        ("tensors", {}),
    ]
    for key in ("fold", "before", "after"):
        values.append((f"{key}/sha256", hexadecimal))
    for number, key in enumerate(("before", "after", "base", "model") * 2):
        values.append((f"tensors/{names[number % len(names)]}/{key}", hexadecimal))
    for number, factor in enumerate((2.0, 1000.0, 0.5, 1.0001)):
        values.append((f"tensors/{names[number]}/bound", lambda old, factor=factor: old * factor))
        values.append((f"tensors/{names[number]}/off", lambda old, factor=factor: old * factor + 1e-12))
    for path, value in values:
        yield {"certificate": signed(changed(taken.certificate, path, value))}


def swaps(taken: Taken) -> Iterator[dict[str, Any]]:
    """Digests change places; tensors are left out, put in, or said to come from elsewhere."""
    first, second = list(taken.certificate["tensors"])[1:3]
    for key in ("before", "after", "base", "model"):
        found = copy.deepcopy(taken.certificate)
        one, other = found["tensors"][first], found["tensors"][second]
        one[key], other[key] = other[key], one[key]
        yield {"certificate": signed(found)}
    for name in (first, second, "lm_head.weight"):
        found = copy.deepcopy(taken.certificate)
        one = found["tensors"][name]
        one["before"], one["after"] = one["after"], one["before"]
        yield {"certificate": signed(found)}
        found = copy.deepcopy(taken.certificate)
        del found["tensors"][name]
        yield {"certificate": signed(found)}
        nothing = {"from": None, "model": None, "base": None, "bound": 0.0, "off": 0.0}
        found = copy.deepcopy(taken.certificate)
        found["tensors"][name] |= nothing
        yield {"certificate": signed(found)}
        found["extra"] = [name]
        yield {"certificate": signed(found)}
    found = copy.deepcopy(taken.certificate)
    found["tensors"][first]["from"] = second
    yield {"certificate": signed(found)}
    found = copy.deepcopy(taken.certificate)
    found["tensors"]["more"] = found["tensors"][first]
    yield {"certificate": signed(found)}
    backwards = copy.deepcopy(taken.certificate)
    backwards["before"], backwards["after"] = backwards["after"], backwards["before"]
    yield {"certificate": signed(backwards)}
    again = copy.deepcopy(taken.certificate)
    again["after"] = again["before"]
    yield {"certificate": signed(again)}


def places(taken: Taken, work: Path) -> Iterator[dict[str, Any]]:
    """Other directories than those that it is about."""
    beside = taken.model.parent
    for model in ("ft-0", "ft-2", "base", "none"):
        yield {"model": beside / model}
    for base in ("other", "ft-0", "none"):
        yield {"base": beside / base}
    for key in ("before", "after"):
        yield {key: beside / "none"}
    for number, change in enumerate(
        (
            lambda tensors: tensors["lm_head.weight"].view(-1)[0].add_(1e-6),
            lambda tensors: tensors.pop("lm_head.weight"),
            lambda tensors: tensors.update({"brought.weight": torch.ones(2)}),
            lambda tensors: tensors.update({"x.lm_head.weight": tensors.pop("lm_head.weight")}),
        )
    ):
        tensors = load_file(taken.model / "model.safetensors")
        change(tensors)
        (work / f"model-{number}").mkdir()
        save_file(tensors, work / f"model-{number}" / "model.safetensors")
        yield {"model": work / f"model-{number}"}


def bytes_of_the_state(taken: Taken, work: Path) -> Iterator[dict[str, Any]]:
    """The forger has changed the state, too, and made digests and bounds anew by the verifier's own arithmetic."""
    tensors = list(taken.certificate["tensors"])
    theirs, ours = (load_file(each / "model.safetensors") for each in (taken.model, taken.base))
    other = load_file(taken.model.parent / "ft-2" / "model.safetensors")

    def forged(number: int, change: Callable[[str, np.ndarray], np.ndarray]) -> dict[str, Any]:
        state = work / f"state-{number}"
        shutil.copytree(taken.state, state)
        for name in tensors:
            generation = state / "generations" / taken.certificate["after"]["generation"]
            shape = taken.certificate["tensors"][name]["shape"]
            values = change(name, verifier.accumulator(generation, name, shape).copy()).astype("<f4").tobytes()
            (chunk,) = (generation / "sum" / encoded(name)).glob("c*")
            chunk.unlink()  # it may be a hard link
            chunk.write_bytes(values + google_crc32c.value(values).to_bytes(4, "little"))
        return {"certificate": made_anew(taken, state), "before": taken.state, "after": state}

    def less(name: str, share: float, of: dict[str, torch.Tensor]) -> np.ndarray:
        return np.asarray(share * 0.5 * (of[name].double() - ours[name].double()).flatten().numpy())

    yield forged(1, lambda name, old: old + less(name, 0.01, theirs))  # a hundredth of the model is left
    yield forged(2, lambda name, old: old + less(name, 1.0, theirs))  # all of it
    yield forged(3, lambda name, old: old + (less(name, 1.0, theirs) if name == tensors[0] else 0))
    yield forged(4, lambda name, old: old + less(name, 1.0, theirs) - less(name, 1.0, other))  # another was taken out
    yield forged(5, lambda name, old: old - less(name, 1.0, theirs))  # it was taken out twice
    yield forged(6, lambda _, old: old * np.float32(1.001))
    yield forged(7, lambda name, old: old * 0 if name == tensors[0] else old)
    yield forged(8, lambda _, old: np.where(np.arange(old.size) == old.size - 1, np.nan, old))
    yield forged(9, lambda _, old: old + (np.arange(old.size) == 3) * np.float32(1e-7))
    yield forged(10, lambda _, old: old[::-1].copy())


def made_anew(taken: Taken, after: Path) -> dict[str, Any]:
    """The certificate with digests and bounds of what a state holds after, and of the records there."""
    found = copy.deepcopy(taken.certificate)
    generation = "generations"
    directories = verifier.Generations(
        taken.state / generation / found["before"]["generation"],
        after / generation / found["after"]["generation"],
        verifier.FileWeights(taken.base),
        verifier.FileWeights(taken.model),
    )
    taken_sq = bound_sq = 0.0
    for name, said in found["tensors"].items():
        try:
            facts = verifier.facts(directories, name, found["model"]["weight"], said)
        except Refused:
            continue
        found["tensors"][name] |= {"after": facts.after, "bound": facts.bound, "off": facts.off}
        taken_sq, bound_sq = taken_sq + facts.taken_sq, bound_sq + facts.bound_sq
    return signed(found | {"bound": (bound_sq / taken_sq) ** 0.5 if taken_sq else found["bound"]})


def records(taken: Taken, work: Path) -> Iterator[dict[str, Any]]:
    """The forger has written records anew, and their digests."""
    certificate = taken.certificate
    changes: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("after", lambda body: body.update(kind="fold")),
        ("after", lambda body: body["numbers"].update(of=1)),
        ("after", lambda body: body["numbers"].update(key="x")),
        ("after", lambda body: body["numbers"].update(again=[2])),
        ("after", lambda body: body.update(digest="blake3:0")),
        ("after", lambda body: body.update(prev="00000000")),
        ("after", lambda body: body.update(generation=certificate["before"]["generation"])),
        ("fold", lambda body: body["numbers"].update(weight=0.4)),
        ("fold", lambda body: body["numbers"].update(tensors=3)),
        ("fold", lambda body: body.update(digest="blake3:0")),
    ]
    for number, (key, change) in enumerate(changes):
        state = work / f"records-{number}"
        shutil.copytree(taken.state, state)
        file = state / "commits" / f"{certificate[key]['seq']:08d}.json"
        body, _ = framing.decode(file)
        change(body)
        data, _ = framing.encode(body)
        file.unlink()
        file.write_bytes(data)
        found = copy.deepcopy(certificate)
        found[key]["sha256"] = verifier._sha(data)
        yield {"certificate": signed(found), "before": state, "after": state}


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
