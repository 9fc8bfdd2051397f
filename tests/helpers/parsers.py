"""Every parser of bytes that others wrote, as a row of a table: how it is called, valid inputs, and what it may raise.

A new parser gets a row. The campaign (tests/campaigns/fuzz.py) and the slice of it that the gate runs take it from
here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from safetensors.torch import save

from continual.errors import ContinualError, Misconfigured, Refuse
from continual.gates.weight import WeightGate
from continual.hub import Trouble, trouble
from continual.hub import answers as answers_of
from continual.objectives.rows import read_heads, read_rows
from continual.outside import Malformed, parse_json, shown
from continual.publish.hub import stamp_of
from continual.sources.webhook import LARGEST, Payload, push_of
from continual.tensors import Folder, open_model, read_json, release_of
from continual.tensors.adapters.adapter import kind_of
from continual.tensors.adapters.adapter_config import CONFIG as ADAPTER
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.adapters.patterns import Patterns
from continual.tensors.checkpoints import header
from continual.tensors.checkpoints.checkpoint import INDEX, read_config, weight_files
from continual.tuning.command import parse as parse_score
from tests.helpers import fuzzing, kinds_of_adapters


class Parser(NamedTuple):
    """`call` takes an input, whatever it is; `inputs` makes wrong ones; `raises` is what may come of them, beside a
    result; `valid` are some that must be read."""

    name: str
    call: Callable[[bytes], object]
    inputs: fuzzing.Inputs
    raises: tuple[type[Exception], ...]
    valid: tuple[bytes, ...]


MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "a" * 800, "ab.b_a." * 30 + "c")
TENSORS = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 2)}
FACTORS = {"base_model.model.a.lora_A.weight": torch.ones(2, 3), "base_model.model.a.lora_B.weight": torch.ones(4, 2)}
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["a"],
    "rank_pattern": {"q_proj": 2, r"layers\.\d+\.mlp.*": 3, "layers.0.self_attn": 1},
    "alpha_pattern": {"^model.*_proj$": 1.5},
    "modules_to_save": ["score"],
    "use_rslora": False,
    "init_lora_weights": True,
    "bias": "none",
}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "c": {"dtype": "U8", "shape": [0, 4], "data_offsets": [22, 22]},
}
SHARDS = {"metadata": {"total_size": 1}, "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
CONFIGURATION = {"model_type": "bert", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}
METRICS = {"eval": {"accuracy": 0.5}, "score": 3}
OURS = {"state": "ab", "seq": 3, "base": {"path": "x"}, "folded": [{"seq": 1, "digest": "blake3:00"}]}
PUSH = {
    "event": {"action": "update", "scope": "repo.content"},
    "repo": {"type": "model", "name": "org/name", "headSha": "0" * 40},
    "updatedRefs": [{"ref": "refs/heads/main", "newSha": "1" * 40}],
}
HUB = "https://hub"
ROW = {
    "id": "org/name",
    "sha": "2" * 40,
    "lastModified": "2026-01-31T12:00:00.000Z",
    "tags": ["base_model:finetune:org/base", "license:mit"],
    "gated": False,
    "private": False,
}
SIBLING = {"rfilename": "a.safetensors", "size": 3, "blobId": "3" * 40, "lfs": {"sha256": "4" * 64, "size": 3}}
TREE = {"type": "file", "path": "a/b", "oid": "3" * 40, "size": 3, "lfs": {"oid": "4" * 64, "size": 3}}
ROWS = [{"text": "one", "label": "good"}, {"text": "two", "label": 1}]
HEADS = {"good": ["fine", "great"], "bad": ["awful"]}


def _wrapped(text: bytes) -> bytes:
    """A safetensors file around a header."""
    return len(text).to_bytes(8, "little") + text + bytes(22)


def _header(data: bytes) -> object:
    def pread(length: int, offset: int) -> bytes:
        return data[offset : offset + length]

    found = header.parse(pread, len(data), "x.safetensors")
    header.metadata(pread, "x.safetensors")
    assert 8 + int.from_bytes(data[:8], "little") + sum(info.nbytes for info in found.values()) == len(data)
    return found


class _Models:
    """A directory of this process in which an input is a file of a model."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # disks are slow, and not what is looked at
        self._home = tempfile.TemporaryDirectory(prefix="continual-fuzz-", dir=memory)
        self.path = Path(self._home.name)

    def alone(self, name: str, data: bytes) -> Folder:
        """A model that has nothing but a file."""
        folder = self.path / name.replace(".", "-")
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return Folder(folder, self.path)

    def beside(self, files: Mapping[str, bytes], name: str, data: bytes) -> Folder:
        """A model with an input among its files."""
        folder = self.path / f"{name.replace('.', '-')}-beside"
        folder.mkdir(exist_ok=True)
        for file, content in {**files, name: data}.items():
            (folder / file).write_bytes(content)
        return Folder(folder, self.path)


def table() -> tuple[Parser, ...]:
    """All parsers. Their files lie in a directory that goes with the last of them."""
    models = _Models()
    refuse = (Refuse,)

    def adapter_config(data: bytes) -> object:
        place = models.alone(ADAPTER, data)
        file = place.open([ADAPTER])
        try:
            fields = Fields(place, file)
            kind = kind_of(fields)
            modules = kinds_of_adapters.MODULES.get(str(fields.kind), {})
            pieces = kind.pieces(fields, modules)
            tables = () if fields.kind == "ADALORA" else (fields.ranks("rank_pattern"), fields.numbers("alpha_pattern"))
            return fields.bias, fields.transposed, pieces, [table.of(MODULES) for table in tables]
        finally:
            file.close()

    def adapter(data: bytes) -> object:
        config = fuzzing.text_of(LORA)
        with open_model(models.beside({ADAPTER: config}, "adapter_model.safetensors", data)) as model:
            return model.files

    def sharded(data: bytes) -> object:
        shards = {f"x-{i}.safetensors": save({name: torch.ones(2)}) for i, name in ((1, "a"), (2, "b"))}
        with open_model(models.beside(shards, INDEX, data)) as model:
            return model.nbytes

    def weight(data: bytes) -> object:
        gate = WeightGate(weight="metrics.json:eval.accuracy")
        body = read_json(models.alone("metrics.json", data), "metrics.json", gate.name)
        return shown(body)

    def patterns(data: bytes) -> object:
        keys = data.decode("utf-8", "replace").split("\n")
        return Patterns(dict.fromkeys(keys, 1), "x", "rank_pattern").of(MODULES)

    def delivery(data: bytes) -> object:
        if len(data) > LARGEST:
            raise ValueError("the service answers 413")
        return push_of(Payload.model_validate_json(data))

    def rows(data: bytes) -> object:
        models.alone("rows.jsonl", data)
        return read_rows(models.path / "rows-jsonl/rows.jsonl", labelled=True)

    def heads(data: bytes) -> object:
        models.alone("heads.json", data)
        return read_heads(models.path / "heads-json/heads.json")

    def score(data: bytes) -> object:
        return parse_score(data.decode("utf-8", "replace"), "eval.accuracy")

    def lines(text: bytes) -> bytes:
        return text.removeprefix(b"[").removesuffix(b"]").replace(b'},{"', b'}\n{"')

    def of_json(
        name: str, call: Callable[[bytes], object], seed: object, raises: tuple[type[Exception], ...] = refuse
    ) -> Parser:
        return Parser(name, call, fuzzing.documents([seed]), raises, (fuzzing.text_of(seed),))

    whole, factors = save(TENSORS, metadata={"format": "pt"}), save(FACTORS)
    return (
        of_json("JSON", parse_json, [LORA, HEADER, "é\U0001f600", 1.5], (Malformed,)),
        Parser("safetensors file", _header, fuzzing.files([whole]), refuse, (whole,)),
        Parser(
            "safetensors header",
            _header,
            fuzzing.documents([HEADER], _wrapped),
            refuse,
            (_wrapped(fuzzing.text_of(HEADER)),),
        ),
        of_json("index", lambda data: weight_files(models.alone(INDEX, data)), SHARDS),
        of_json("index beside its shards", sharded, SHARDS),
        of_json("config.json", lambda data: read_config(models.alone("config.json", data)), CONFIGURATION),
        of_json("adapter_config.json", adapter_config, LORA),
        *(of_json(f"{seed['peft_type']}", adapter_config, seed) for seed in kinds_of_adapters.SEEDS),
        Parser("adapter", adapter, fuzzing.files([factors]), refuse, (factors,)),
        Parser("patterns", patterns, fuzzing.patterns, refuse, (b"q_proj\nlayers.0", rb"layers\.\d+.*")),
        of_json("continual.json", lambda data: release_of(models.alone("continual.json", data)), OURS, ()),
        of_json("metrics.json", weight, METRICS),
        # the service answers 400 to both
        of_json("webhook", delivery, PUSH, (ValidationError, ValueError)),
        Parser("rows", rows, fuzzing.documents([ROWS], lines), (Misconfigured,), (lines(fuzzing.text_of(ROWS)),)),
        of_json("heads", heads, HEADS, (Misconfigured,)),
        of_json("score of a command", score, METRICS, (ValueError,)),
        *hub_table(),
    )


def hub_table() -> tuple[Parser, ...]:
    """The parsers of what the Hub says: the bodies of its answers, and their headers."""
    answers: tuple[tuple[str, Callable[[bytes, str], object], object], ...] = (
        ("Hub: models", answers_of.models_of, [ROW, ROW | {"gated": "manual"}]),
        ("Hub: a model", answers_of.model_of, ROW | {"siblings": [SIBLING]}),
        ("Hub: a tree", answers_of.tree_of, [TREE, {"type": "directory", "path": "a"}]),
        ("Hub: commits", answers_of.commits_of, [{"id": "2" * 40}]),
        ("Hub: tags", answers_of.tags_of, {"tags": [{"name": "v1", "targetCommit": "2" * 40}]}),
    )

    def header_of(call: Callable[[str], object]) -> Callable[[bytes], object]:
        return lambda data: call(data.decode("latin-1"))

    headers: tuple[tuple[str, Callable[[str], object], bytes], ...] = (
        ("Hub: Retry-After", lambda text: trouble.wait_of({"retry-after": text}), b"17.5"),
        ("Hub: RateLimit", lambda text: trouble.wait_of({"ratelimit": text}), b'"api";r=0;t=55'),
        ("Hub: Content-Range", trouble.span_of, b"bytes 0-99/1000"),
        ("Hub: Link", lambda text: trouble.next_of(text, f"{HUB}/a", HUB), b'<https://hub/a?cursor=b>; rel="next"'),
    )
    return (
        *(
            Parser(
                name,
                partial(call, what="what was asked for"),
                fuzzing.documents([seed]),
                (Trouble, Refuse),
                (fuzzing.text_of(seed),),
            )
            for name, call, seed in answers
        ),
        *(
            Parser(name, header_of(call), fuzzing.files([valid]), (trouble.Failed,), (valid,))
            for name, call, valid in headers
        ),
        Parser(
            "Hub: a release",
            stamp_of,
            fuzzing.documents([OURS]),
            (),
            (fuzzing.text_of(OURS),),
        ),
    )


OWN = (ContinualError, Malformed)
"""Error classes of this package."""
