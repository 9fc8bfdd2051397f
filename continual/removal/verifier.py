"""Checks a certificate that a model was taken out of a merge, from the bytes that were published, without trusting
whoever wrote it. It needs Python 3.11 and numpy, and nothing of continual: take this one file.

    python verifier.py CERTIFICATE --before STATE --after STATE --model DIR --base DIR

STATE is a state or a backup of one, before and after (one can be both, where it has both generations); DIR the
fine-tune that was taken out, and the base, as safetensors files. It says `verified` and ends with 0, or why not and
ends with 1.

A state keeps of each tensor a float32 sum S = Σ w·τ, τ being a fine-tune less the base. What is checked, element by
element of every tensor that the state keeps: S after = S before − w·τ, up to the rounding of that one operation,
u·(|S after| + 2·w·|τ|) with u = 2⁻²⁴: one rounding of the difference, one of the product, one of w. Nothing else can
have been done, and nothing of the model can be left that is larger. The bound follows from the bytes; what the
certificate says of it has to be the same. The digests are SHA-256 of the values in their files, so that a certificate
is about these bytes alone. Where no model is left, S after has to be zero.

The records of the ledger that fold it and take it out are read from the state, too: they have to say the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KIND = "continual.removal/1"
SLOT = "sum"
ULP = 2.0**-24
"""Half a unit in the last place of float32, relative."""
TINY = 2.0**-148
"""What rounding can be off by where numbers are too small for a relative bound."""
MOST = 0.01
"""Of the length of what was taken out, what the rounding may come to; beyond that it could hide the model."""
_SLACK = 1 + 2.0**-20  # for the rounding of this check itself, in float64
_PIECE = 1 << 20
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LARGEST = 1 << 30
_KEYS = {"kind", "state", "rule", "options", "model", "fold", "before", "after", "tensors", "bound", "extra", "digest"}
_OF_TENSOR = {"shape", "from", "twins", "before", "after", "base", "model", "bound", "off"}

Floats = NDArray[np.float32]
Said = Mapping[str, Any]
Object = dict[str, Any]


class Refused(Exception):
    """The certificate is not believed; the message says why."""


def must(fact: object, message: str) -> None:
    """Raises Refused with this message where something is not so."""
    if not fact:
        raise Refused(message)


class SumFacts(NamedTuple):
    """What the bytes of one tensor say: digests of the sum before and after, of the base's values and the model's (None
    where the model lacks it), the largest `bound` of an element and how much one is `off`; and the sums of squares of
    w·τ, of the bounds and of what is left after."""

    before: str
    after: str
    base: str | None
    model: str | None
    bound: float
    off: float
    beyond: float
    at: int
    taken_sq: float
    bound_sq: float
    left_sq: float


class Holding(NamedTuple):
    """What was verified: how many tensors, ‖w·τ‖, what rounding may come to over that; `empty`: no model is left."""

    tensors: int
    taken: float
    share: float
    empty: bool


class FileWeights:
    """The tensors of a model directory, by name, read from its safetensors files."""

    def __init__(self, directory: Path) -> None:
        self.where = directory
        self._found: dict[str, tuple[Path, int, Object]] = {}
        files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else [directory]
        must(files and files[0].is_file(), f"{directory} has no safetensors files")
        for file in files:
            with open(file, "rb") as data:
                size = int.from_bytes(data.read(8), "little")
                must(size <= _LARGEST, f"{file} is no safetensors file")
                header = _object(data.read(size), file)
            header.pop("__metadata__", None)
            for name, info in header.items():
                must(name not in self._found, f"{directory}: tensor {name} is in two files")
                self._found[name] = file, 8 + size, info

    @property
    def names(self) -> set[str]:
        """The tensors of numbers that can be trained."""
        return {name for name, (_, _, info) in self._found.items() if str(info["dtype"]).startswith(("F", "BF"))}

    def read(self, name: str) -> tuple[str, tuple[int, ...], bytes]:
        """Dtype, shape and bytes of a tensor."""
        must(name in self._found, f"{self.where} has no tensor {name}")
        file, start, info = self._found[name]
        begin, end = info["data_offsets"]
        with open(file, "rb") as data:
            data.seek(start + begin)
            raw = data.read(end - begin)
        dtype, shape = str(info["dtype"]), tuple(info["shape"])
        whole = dtype in _DTYPES and len(raw) == math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        must(whole, f"{file}: tensor {name} is {dtype} of {len(raw)} bytes")
        return dtype, shape, raw


def single(dtype: str, raw: bytes) -> Floats:
    """The values as float32, flat; exact but for float64."""
    values = np.frombuffer(raw, _DTYPES[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def narrowed(values: Floats, dtype: str) -> Floats:
    """float32 rounded to a narrower dtype, to the nearest, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)


def accumulator(generation: Path, name: str, shape: Sequence[int]) -> Floats:
    """The sum of a tensor in a generation, flat: a Zarr array in blocks of rows, each with a checksum behind it."""
    folder = generation / SLOT / encoded(name)
    body = _object(_bytes(folder / "zarr.json"), folder)
    kinds = [codec.get("name") for codec in body["codecs"]]
    plain = (body["shape"], body["data_type"], kinds) == (list(shape), "float32", ["bytes", "crc32c"])
    must(plain, f"{folder} is no float32 array of shape {list(shape)}")
    if 0 in shape:
        return np.zeros(0, np.float32)
    block = body["chunk_grid"]["configuration"]["chunk_shape"]
    must(block[1:] == list(shape[1:]), f"{folder} is not cut by rows")
    keys = ["c"] if not shape else [f"c.{i}{'.0' * (len(shape) - 1)}" for i in range(-(-shape[0] // block[0]))]
    parts = [np.frombuffer(_bytes(folder / key)[:-4], "<f4") for key in keys]
    values = np.concatenate(parts)[: math.prod(shape)]
    must(len(values) == math.prod(shape), f"{folder} ends early")
    return values


def encoded(name: str) -> str:
    """A tensor's name as the name of a directory."""
    found = re.sub(r"[^A-Za-z0-9._-]", lambda c: "".join(f"%{byte:02X}" for byte in c[0].encode()), name)
    if found == "zarr.json":
        return "%7Aarr.json"
    if found.startswith("."):
        return f"%2E{found[1:]}"
    return f"%5F{found[1:]}" if found.startswith("__") else found


class Generations(NamedTuple):
    """The directories of the generations before and after, and the files of base and model."""

    before: Path
    after: Path
    base: FileWeights
    model: FileWeights


def task_vector(places: Generations, name: str, said: Said) -> tuple[Floats, str | None, str | None]:
    """τ of a tensor, flat, and the digests of the base's values and of the model's."""
    source, shape = said["from"], said["shape"]
    if source is None:
        return np.zeros(math.prod(shape), np.float32), None, None
    ours, ours_shape, ours_raw = places.base.read(name)
    theirs, theirs_shape, theirs_raw = places.model.read(source)
    fits = ours_shape == tuple(shape) and ours_shape[1:] == theirs_shape[1:] and len(ours_shape) == len(theirs_shape)
    must(fits, f"{source} has the shape {list(theirs_shape)}, and {name} of the base {list(ours_shape)}")
    for twin in said["twins"]:
        must(places.model.read(twin)[2] == theirs_raw, f"{source} and {twin} are one tensor, and differ in the model")
    base, values = single(ours, ours_raw), single(theirs, theirs_raw)
    if theirs not in (ours, "F32"):
        base = narrowed(base, theirs)
    tau = np.zeros(math.prod(shape), np.float32)
    common = min(len(base), len(values))  # of vocabularies of two sizes the rows that both have
    tau[:common] = values[:common] - base[:common]
    return tau, _sha(ours_raw), _sha(theirs_raw)


def facts(places: Generations, name: str, weight: float, said: Said) -> SumFacts:
    """What the bytes of one tensor say. `said` names the tensor of the model (`from`), and its `twins`."""
    shape = said["shape"]
    before, after = (accumulator(each, name, shape) for each in (places.before, places.after))
    tau, base, model = task_vector(places, name, said)
    bound, off, beyond, at = 0.0, 0.0, 0.0, 0
    squares = [0.0, 0.0, 0.0]
    for start in range(0, len(tau), _PIECE):
        b, a, t = (part[start : start + _PIECE].astype(np.float64) for part in (before, after, tau))
        t *= weight
        allowed = np.where(t != 0, ULP * (np.abs(a) + 2 * np.abs(t)) * _SLACK + TINY, 0.0)
        deviation = np.abs(a - (b - t))
        must(np.isfinite(deviation).all(), f"{name} has values that are not finite")
        excess = deviation - allowed
        if excess.max() > beyond:
            beyond, at = float(excess.max()), start + int(excess.argmax())
        bound, off = max(bound, float(allowed.max())), max(off, float(deviation.max()))
        squares = [total + float(np.vdot(part, part)) for total, part in zip(squares, (t, allowed, a), strict=True)]
    return SumFacts(_sha(before), _sha(after), base, model, bound, off, beyond, at, *squares)


def verify(certificate: Said, before: Path, after: Path, model: Path, base: Path) -> Holding:
    """Checks all of a certificate. Raises Refused."""
    check_form(certificate)
    made = _object(_bytes(before / "format.json").partition(b"\n")[2], before)
    must(_bytes(before / "format.json") == _bytes(after / "format.json"), f"{before} and {after} are two states")
    must(made["id"] == certificate["state"], "the certificate is of another state")
    for key in ("rule", "options"):
        must(made[key] == certificate[key], f"{key} of the state is {made[key]!r}, and not {certificate[key]!r}")
    same = kept(made) == {name: said["shape"] for name, said in certificate["tensors"].items()}
    must(same, "the certificate has other tensors, or of other shapes, than the state keeps")
    check_records(certificate, before, after)
    places = Generations(
        before / "generations" / certificate["before"]["generation"],
        after / "generations" / certificate["after"]["generation"],
        FileWeights(base),
        FileWeights(model),
    )
    check_used(certificate, places.model.names, {tensor["name"] for tensor in made["tensors"] if not tensor["slots"]})
    found = {}
    for name, said in certificate["tensors"].items():
        found[name] = one = facts(places, name, certificate["model"]["weight"], said)
        for key in ("before", "after", "base", "model"):
            must(getattr(one, key) == said[key], f"{name}: the bytes of {key!r} are others than those it is about")
        for key in ("bound", "off"):
            right = math.isclose(getattr(one, key), said[key], rel_tol=1e-9)
            must(right, f"{name}: {key} is {getattr(one, key):.9g}, and not {said[key]!r} as is said")
    verdict, stated = judged(found), certificate["bound"]
    right = math.isclose(verdict.share, stated, rel_tol=1e-9)
    must(right, f"rounding is {verdict.share:.9g} of the model, and not {stated!r} as is said")
    return verdict


def judged(found: Mapping[str, SumFacts]) -> Holding:
    """What the facts of all tensors come to. Raises Refused where more than rounding is left, or where they prove
    nothing."""
    taken = math.sqrt(math.fsum(one.taken_sq for one in found.values()))
    bound = math.sqrt(math.fsum(one.bound_sq for one in found.values()))
    empty = not any(one.left_sq for one in found.values())
    must(taken, "the model is equal to the base: nothing was taken out")
    share = bound / taken
    must(empty or share <= MOST, f"rounding comes to {share:.2%} of the model, which could hide it")
    for name, one in found.items():
        told = f"{name}: element {one.at} is not less by the model: {one.beyond:.3g} beyond rounding"
        must(empty or one.beyond <= 0, told)
    return Holding(len(found), taken, share, empty)


def check_form(certificate: Said) -> None:
    """Whether it is a certificate, whole and unchanged."""
    whole = isinstance(certificate, Mapping) and certificate.get("kind") == KIND and set(certificate) == _KEYS
    must(whole, f"this is no certificate of the kind {KIND}")
    must(digest(certificate) == certificate["digest"], "the certificate was changed: its digest is another")
    weight = certificate["model"].get("weight")
    must(isinstance(weight, float) and 0 < weight < math.inf, f"weight is {weight!r}")
    for name, said in certificate["tensors"].items():
        whole = set(said) == _OF_TENSOR and (said["from"] is None) == (said["model"] is None)
        must(whole, f"what the certificate says of {name} is not whole")


def digest(certificate: Said) -> str:
    """SHA-256 of all of a certificate but its digest."""
    body = {key: value for key, value in certificate.items() if key != "digest"}
    return _sha(json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())


def kept(made: Said) -> dict[str, list[int]]:
    """The tensors that a state keeps a sum of, and their shapes. Raises Refused where it keeps something else."""
    plain = made.get("form") is None and not made["options"].get("before")
    must(plain, "a state that keeps adapters, or changes task vectors before they are folded, is no plain sum")
    found = {tensor["name"]: tensor for tensor in made["tensors"] if tensor["slots"]}
    for name, tensor in found.items():
        sums = tensor["slots"] == {SLOT: {"shape": tensor["shape"], "dtype": "float32"}}
        must(sums, f"the state keeps more than a sum of {name}")
    return {name: tensor["shape"] for name, tensor in found.items()}


def check_records(certificate: Said, before: Path, after: Path) -> None:
    """Whether the records of the ledger say what the certificate says."""
    model, fold = certificate["model"], certificate["fold"]
    places = ((before, "before"), (after, "after"), (after, "fold"))
    first, last, folded = (_record(place, certificate[key]) for place, key in places)
    follows = last["seq"] == first["seq"] + 1 and last["prev"] == first["crc"]
    must(follows, "the two records do not follow each other")
    for record, key in ((first, "before"), (last, "after")):
        held = record["generation"] or ""
        right = held == certificate[key]["generation"] and re.fullmatch(r"[0-9a-f]{16}", held)
        must(right, f"record {record['seq']} holds another generation")
    numbers = last["numbers"] or {}
    subtracts = last["kind"] == "unfold" and numbers.get("of") == fold["seq"] and not numbers.get("again")
    must(subtracts, f"record {last['seq']} does not subtract what record {fold['seq']} folded")
    listed = [folded] if folded["kind"] == "fold" else (folded["numbers"] or {}).get("folds", [])
    mine = next((one for one in listed if (one["candidate"] or {}).get("key") == numbers.get("key")), {})
    about = mine.get("digest") == model["digest"] == last["digest"]
    must(about, "the records are about another model")
    candidate, told = mine["candidate"], mine["numbers"] or {}
    called = (candidate["name"], candidate.get("revision")) == (model["name"], model["revision"])
    must(called, "the records have another name or revision of the model")
    changed = sum(1 for said in certificate["tensors"].values() if said["from"] is not None)
    same = told.get("tensors", changed) == changed and (told.get("extra") or []) == certificate["extra"]
    must(same, f"record {fold['seq']} folded other tensors of the model")
    given = told.get("weight")
    weighed = (1.0 if given is None else given) == model["weight"]
    must(weighed, f"the model was folded with the weight {given!r}, and the certificate says {model['weight']!r}")


def check_used(certificate: Said, names: set[str], carried: set[str]) -> None:
    """Whether every tensor of the model is accounted for: taken out under some name, one that the base lacks, or one
    that the state does not fold (`carried`)."""
    tensors, extra = certificate["tensors"], certificate["extra"]
    used = [name for said in tensors.values() if said["from"] is not None for name in (said["from"], *said["twins"])]
    must(len(set(used)) == len(used), "a tensor of the model is named twice")
    carried -= set(tensors)

    def like(name: str, others: Iterable[str]) -> bool:  # up to a leading part
        return any(f".{name}".endswith(f".{one}") or f".{one}".endswith(f".{name}") for one in others)

    for name in sorted(names - set(used) - carried):
        apart = (name in extra or like(name, carried)) and not like(name, tensors)
        must(apart, f"the model has {name}, and the certificate leaves it out")


def _record(state: Path, said: Said) -> Object:
    """A record of the ledger, with the checksum in its first line."""
    seq = said["seq"]
    must(isinstance(seq, int) and 0 <= seq < 10**8, f"{seq!r} is no number of a record")
    file = state / "commits" / f"{seq:08d}.json"
    raw = _bytes(file)
    must(_sha(raw) == said["sha256"], f"{file} is not the record that the certificate is about")
    checksum, _, body = raw.partition(b"\n")
    return {**_object(body, file), "crc": checksum.decode("ascii", "replace")}


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}") from None


def _object(raw: bytes, where: object) -> Object:
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    must(isinstance(found, dict), f"{where} has no JSON object where one is to be")
    return dict(found or {})


def _sha(data: bytes | Floats) -> str:
    return hashlib.sha256(data.data if isinstance(data, np.ndarray) else data).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where the certificate holds, 1 where it does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("certificate", type=Path)
    for name in ("before", "after", "model", "base"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        certificate = _object(_bytes(args.certificate), args.certificate)
        found = verify(certificate, args.before, args.after, args.model, args.base)
    except Refused as error:
        said, code = f"NOT verified: {error}", 1
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
        said, code = f"NOT verified: something is not as it has to be ({type(error).__name__}: {error})", 1
    else:
        left = "no model is left" if found.empty else f"rounding is at most {found.share:.2g} of it"
        said = f"verified: {certificate['model']['name']} was taken out of {found.tensors} tensors, length "
        said, code = f"{said}{found.taken:.6g}; {left}", 0
    sys.stdout.write(said.encode("ascii", "backslashreplace").decode() + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
