"""Forged certificates that a model was taken out, of every kind that we thought of."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from continual.removal import verifier
from continual.removal.verifier import Refused, digest, encoded, verify
from continual.state import framing


class Taken(NamedTuple):
    """A model that was taken out: the certificate, and the directories that it is checked from."""

    certificate: dict[str, Any]
    state: Path
    model: Path
    base: Path

    def verify(self, **other: Any) -> verifier.Holding:
        given = {"certificate": self.certificate, "before": self.state, "after": self.state}
        return verify(**{**given, "model": self.model, "base": self.base, **other})


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
