"""The base of a state: measured when the state is made, found again and compared when it is opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from continual.errors import Damaged, Misconfigured, Refuse
from continual.executors.contract import Progress, silent
from continual.hub.locate import Places
from continual.lazily import torch
from continual.linalg import inner
from continual.records import SCHEME
from continual.state import State
from continual.state.format import BaseFile, BaseRecord, Format
from continual.tensors import Adapter, BaseModel, Checkpoint, Place, describe, open_model
from continual.tensors.bases.kept import kept_base
from continual.tensors.bases.packed import unpacked
from continual.tensors.checkpoints import foreign
from continual.tensors.checkpoints.checkpoint import TORCH, part_files
from continual.tensors.checkpoints.compound import COPIED, manifest_of, parts_of
from continual.tensors.checkpoints.place import MANIFESTS
from continual.tensors.checkpoints.quantised import form_of
from continual.tensors.names.kinds import as_made

if TYPE_CHECKING:
    from continual.hub import Hub, Repo

NOT_FETCHED = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".tflite",
    ".npz",
    ".zip",
    ".tar.gz",
)
"""Files of a base repo that stay there: the same weights in other forms, pickles among them."""
_HASHED = 1 << 20
"""Bytes of the base read at a time at init."""


def open_base(state: State, places: Places, moved: Path | None = None) -> BaseModel:
    """Opens the base of `state`, in the directory where it was at init, or in `moved`; of a state that keeps adapters,
    its headers as the state has them.

    A base that came from the Hub and is gone from this machine is fetched again, at the same commit. If a file has
    another size or time than at init, every tensor is hashed and compared. Raises Misconfigured if the base is not
    there, Damaged naming the first tensor that differs.
    """
    if state.format.base.headers is not None:
        return kept_headers(state.format)
    return weighted_base(state, places, moved)


def kept_headers(form: Format) -> BaseModel:
    """The base of a state of adapters, by its headers, which the format of the state has."""
    record = form.base
    headers = {name: (info.dtype, info.shape) for name, info in (record.headers or {}).items()}
    return kept_base(name_of(record), headers, record.config, form.tensors, record.aliases or {})


def as_recorded(form: Format, place: Place) -> BaseModel:
    """Opens the base of a state of the format `form` at a place where another process has found it: no value is
    compared. Raises as `open_base`."""
    if form.base.packed is not None:
        opened = open_checkpoint(place, packed=True)
        try:
            return _described(opened, form)
        except BaseException:
            opened.close()
            raise
    return _as_made(open_checkpoint(place, whole=_is_whole(form.base.files)), form, sampled=True)


def name_of(record: BaseRecord) -> str:
    """How messages call a base: its repo and commit, else its path."""
    return f"{record.repo}@{record.revision}" if record.repo is not None else record.path


def weighted_base(state: State, places: Places, moved: Path | None = None, *, fetch: bool = True) -> BaseModel:
    """Opens the files of the base of `state`, where they were at init or in `moved`, to read its weights. One that came
    from the Hub and is not on this machine is fetched; without `fetch` it is read there, by ranges. Raises as
    `open_base`."""
    record = state.format.base
    if record.packed is not None:
        return _unquantised(state, moved)
    path = moved or Path(record.path)
    there = bool(record.path) and all((path / file.name).exists() for file in record.files)  # a fetch may be cut off
    if not there and moved is None and record.repo is not None:
        if not fetch:
            return _as_made(open_checkpoint(places.named(f"{SCHEME}{name_of(record)}")), state.format)
        path = fetched(places.hub, record.repo, record.revision, silent).path
    if not path.exists():
        raise Misconfigured(f"base {path} is gone: put it back, or say where it is now with base = DIR (--base)")
    lacking = next((file.name for file in record.files if not (path / file.name).exists()), None)
    if record.headers is not None and lacking is not None:
        raise Misconfigured(
            f"base {path} has no {lacking} any more: put it back, or say where the base is now with base = DIR (--base)"
        )
    model = _as_made(open_checkpoint(path, whole=_is_whole(record.files)), state.format)
    if record.headers is None and files_of(model.checkpoint) != record.files:
        digests = measure_base(model, silent).digests
        if differing := sorted(name for name, digest in record.digests.items() if digests.get(name) != digest):
            raise Damaged(f"base {path} is not the one this state was made from: tensor {differing[0]} differs")
    return model


def _as_made(checkpoint: Checkpoint, form: Format, *, sampled: bool = False) -> BaseModel:
    """The base that a state of the format `form` was made from, from its open files; `sampled` is as `describe` has it.
    Raises Damaged where it is another; then they are closed."""
    record = form.base
    with ExitStack() as unless_it_is:
        unless_it_is.callback(checkpoint.close)
        model = describe(
            checkpoint,
            plain=record.plain,
            exclude=record.exclude,
            tables=[spec.name for spec in form.tensors],  # what a state keeps by itself stays so
            sampled=sampled,
        )
        model = replace(model, specs=as_made(model.specs, form.tensors))
        if model.specs != form.tensors:
            raise Damaged(
                f"base {checkpoint.place} is not the one this state was made from: its tensors have other names, "
                "shapes or dtypes"
            )
        unless_it_is.pop_all()
    return model


def may_have_weights(state: State, moved: Path | None) -> None:
    """Raises Misconfigured where it can be said at once that a state of adapters has no base whose weights a round can
    read: nothing is opened or fetched."""
    record = state.format.base
    if moved is not None:
        return
    if record.packed is not None:
        raise Misconfigured(
            f"base {name_of(record)} is quantised ({record.packed}), and a round takes gradients at the merged model: "
            "name a folder with the model that it was quantised from: base = DIR (--base)"
        )
    lacking = next((file.name for file in record.files if not (Path(record.path) / file.name).exists()), None)
    if record.repo is None and lacking is not None:
        raise Misconfigured(
            f"base {record.path} has no {lacking} any more, and a round takes gradients at the merged model: put it "
            "back, or say where the base is now with base = DIR (--base)"
        )


def _unquantised(state: State, path: Path | None) -> BaseModel:
    """The model that the base of a state was quantised from, in `path`: the weights of such a base are not read. Raises
    Misconfigured where it is not named or cannot be read, Damaged where it has other weights."""
    record = state.format.base
    if path is None:
        raise Misconfigured(
            f"base {name_of(record)} is quantised ({record.packed}), and packed numbers are not added to: export an "
            "adapter (--as-lora), or name a folder with the model that it was quantised from: base = DIR (--base)"
        )
    try:
        opened = open_checkpoint(path, packed=True)
    except Refuse as error:
        raise Misconfigured(f"base {error}") from None
    with ExitStack() as unless_it_is:
        unless_it_is.callback(opened.close)
        model = _described(opened, state.format)
        unless_it_is.pop_all()
    return model


def _described(opened: Checkpoint, form: Format) -> BaseModel:
    """The model that a quantised base was made from, from its open files. Raises as `_unquantised`."""
    record, path = form.base, opened.place
    if quantised := form_of(opened.config, opened.tensors):
        raise Misconfigured(
            f"base {path} is quantised as well ({quantised}): name a folder with the model that {name_of(record)} was "
            "quantised from, in F32, F16 or BF16, or export an adapter (--as-lora)"
        )
    model = describe(opened, plain=record.plain, exclude=record.exclude)
    there = {spec.name: spec.shape for spec in model.specs}
    for spec in form.tensors:
        if len(spec.shape) >= 2 and spec.kind != "carried" and there.get(spec.name) != spec.shape:
            raise Damaged(
                f"base {path} is not the model that {name_of(record)} was quantised from: tensor {spec.name} is "
                f"{list(spec.shape)} there, and {list(there.get(spec.name, ())) or 'missing'} here"
            )
    return model


class Fetched(NamedTuple):
    """A base from the Hub: where its files are now, its repo and commit, and the licence that its card names."""

    path: Path
    repo: str
    revision: str
    licence: str | None


def fetched(hub: Hub, repo: str, revision: str | None, progress: Progress) -> Fetched:
    """Fetches the files of a base into the cache of the Hub's client (HF_HOME): weights, configuration, tokenizer.

    The client compares each file with the SHA-256 that the Hub says. Raises Misconfigured if there is no such repo or
    commit, or if it has no safetensors files; Retry.
    """
    from continual.hub.repo import Repo, download

    try:
        info = hub.info(repo, revision)
        names = [name for name in _wanted(Repo(hub, info.id, info.sha)) if not name.endswith(NOT_FETCHED)]
        if not any(name.endswith(".safetensors") for name in names):
            raise Misconfigured(str(foreign.refuse_names(info.files, f"{repo}@{info.sha[:12]}")))
        progress("fetch", 0, len(names))
        for done, name in enumerate(sorted(names), 1):
            directory = download(hub, repo, info.sha, info.files[name]).parents[name.count("/")]
            progress("fetch", done, len(names))
    except Refuse as error:
        raise Misconfigured(f"base {error}") from None
    return Fetched(directory, info.id, info.sha, info.licence or None)


def _wanted(repo: Repo) -> list[str]:
    """The files of a repo that a base is made of: all near its top, and of a model in several folders those with the
    weights that are read, or copied, and everything small. Raises Refuse and Trouble."""
    if manifest_of(repo) is None:
        return [name for name in repo.info.files if name.count("/") <= 1 and not name.startswith(".")]
    parts = parts_of(repo)
    read = {file.name for file in part_files(repo, parts)}
    folders = {part.folder for part in parts} | {""}
    return [
        name
        for name in repo.info.files
        if (folder := name.rpartition("/")[0]) in folders
        and not name.startswith(".")
        and (name in read or folder in COPIED or not name.endswith(".safetensors"))
    ]


class BaseNumbers(NamedTuple):
    """What a state keeps of the tensors of its base, by name: BLAKE3 of the bytes of each (`digests`), and ‖θ₀‖² of
    each that can be folded (`squares`)."""

    digests: dict[str, str]
    squares: dict[str, float]


def measure_base(base: BaseModel, progress: Progress) -> BaseNumbers:
    """Reads the base once, 1 MiB at a time, for its digests and norms. Raises Retry.

    On one thread of torch: a piece is too short to be shared, and threads that wait for their part of it spin.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(base, progress)
    finally:
        torch.set_num_threads(threads)


def _measured(base: BaseModel, progress: Progress) -> BaseNumbers:
    digests: dict[str, str] = {}
    squares: dict[str, float] = {}
    folded = {spec.name for spec in base.specs if spec.kind != "carried"}
    names = sorted(base.checkpoint.tensors)
    buffer = torch.empty(_HASHED, dtype=torch.uint8)
    progress("hash", 0, len(names))
    for done, name in enumerate(names, 1):
        info = base.checkpoint.tensors[name]
        whole = blake3()
        parts: list[float] = []
        for start in range(0, info.nbytes, _HASHED):
            part = buffer[: min(_HASHED, info.nbytes - start)]
            base.checkpoint.read_part(info, start, part.numpy().data)
            whole.update(part.numpy().data)
            if name in folded:
                values = part.view(TORCH[info.dtype])
                parts.append(inner(values, values))
        digests[name] = whole.hexdigest()
        if name in folded:
            squares[name] = math.fsum(parts)
        progress("hash", done, len(names))
    return BaseNumbers(digests, squares)


def _is_whole(files: Sequence[BaseFile]) -> bool:
    """Whether all folders of the base were read at init: states that are older have what lies at its top alone."""
    return any(file.name in MANIFESTS or "/" in file.name for file in files)


def open_headers(where: Path | Place) -> tuple[Checkpoint, str | None]:
    """Opens a base of which no weight will be read; and how it is quantised, if it is: its tensors are then those of
    the model that it was quantised from. Raises as `open_checkpoint`."""
    found = open_checkpoint(where, packed=True)
    try:
        return unpacked(found)
    except BaseException:
        found.close()
        raise


def open_checkpoint(where: Path | Place, *, whole: bool = True, packed: bool = False) -> Checkpoint:
    """Opens a base; without `whole` only what lies at its top, with `packed` a quantised one as well. Raises
    Misconfigured if there is none or it is an adapter, Refuse if it cannot be read."""
    if isinstance(where, Path) and not where.exists():
        raise Misconfigured(f"base {where}: no such directory")
    try:
        model = open_model(where, whole=whole, packed=packed)
    except Refuse as error:
        if error.reason != "quantised" or packed:
            raise
        more = "a state that keeps adapters needs no weights of its base: 'continual init --adapters' takes this one"
        raise Refuse(error.reason, f"{error}; {more}") from None
    if isinstance(model, Adapter):
        model.close()
        raise Misconfigured(f"base {model.place} is an adapter: a state needs the full model it adapts")
    return model


def files_of(checkpoint: Checkpoint) -> tuple[BaseFile, ...]:
    """The weight files of a base, as they are now."""
    return tuple(BaseFile(file.name, file.size, file.mtime_ns) for file in checkpoint.files)
