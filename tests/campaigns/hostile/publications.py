"""What a stranger may put into a watched folder: each function makes one model directory, or what looks like one.

They are samples of kinds, not the inputs that some defect was found with.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers import models

Make = Callable[[Path, Path], None]
"""Makes the directory (second) as a fine-tune of the base (first) that is wrong in one way."""
PUBLICATIONS: dict[str, Make] = {}
_QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def _of(name: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        PUBLICATIONS[name] = make
        return make

    return keep


def _header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.mkdir()
    claimed = len(header) if length is None else length
    (path / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + header + data)
    (path / "config.json").write_text(json.dumps(models.CONFIG))


def _adapter(path: Path, **config: object) -> None:
    path.mkdir()
    save_file(
        {f"{_QUERY}.lora_A.weight": torch.randn(2, 16), f"{_QUERY}.lora_B.weight": torch.randn(16, 2)},
        path / "adapter_model.safetensors",
    )
    body = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (path / "adapter_config.json").write_text(json.dumps(body))


def _index(path: Path, text: str) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(models.CONFIG))
    (path / "model.safetensors.index.json").write_text(text)


PATTERNS: dict[str, dict[str, object]] = {
    "flag-inside": {"(?i)query": 4},
    "never-ends": {".*.*.*.*.*.*x": 4},
    "nested-quantifiers": {"(a+)+$": 4, "((q|q)*)*_proj": 4},
    "no-expression": {"(((": 4, "[": 4, "*": 4},
    "look-behind": {"(?<=a)b": 4, "(a)\\1": 4, "(?=x)": 4},
    "long-repeat": {"a{1000}{1000}": 4},
    "many": {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(200_000)},
    "long": {"q" * 2_000_000: 4},
    "surrogate": {"\ud800q": 4},
    "rank-huge": {"q_proj": 10**30},
    "rank-text": {"q_proj": "4"},
}
for _name, _table in PATTERNS.items():
    for _key in ("rank_pattern", "alpha_pattern"):
        PUBLICATIONS[f"{_key}-{_name}"] = lambda _base, path, key=_key, table=_table: _adapter(path, **{key: table})

DEEP = "[" * 200_000 + "]" * 200_000
TEXTS = {
    "deep": DEEP,
    "deep-table": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep-inside": '{"weight_map": ' + DEEP + "}",
    "digits": '{"weight_map": {}, "metadata": {"total_size": ' + "9" * 100_000 + "}}",
    "infinite": '{"weight_map": {"a": Infinity}, "x": NaN}',
    "no-text": '{"weight_map": {"a": 1, "b": null, "c": ["d"]}}',
    "outside": '{"weight_map": {"model.norm.weight": "../../../../etc/passwd"}}',
    "absolute": '{"weight_map": {"model.norm.weight": "/etc/passwd"}}',
    "surrogate": '{"weight_map": {"\\ud800": "\\udfff.safetensors"}}',
    "zero": '{"weight_map": {"a": "a\\u0000.safetensors"}}',
    "list": "[]",
    "empty": "",
    "bom": '\ufeff{"weight_map": {}}',
    "wide": '{"weight_map": {' + ",".join(f'"t{i}": "s.safetensors"' for i in range(300_000)) + "}}",
}
for _name, _text in TEXTS.items():
    PUBLICATIONS[f"index-{_name}"] = lambda _base, path, text=_text: _index(path, text)

HEADERS = {
    "deep": DEEP.encode(),
    "no-utf8": b'{"\xff\xfe": 1}',
    "overlap": json.dumps(
        {name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in ("a", "model.norm.weight")}
    ).encode(),
    "negative": b'{"model.norm.weight":{"dtype":"F32","shape":[-16],"data_offsets":[-64,0]}}',
    "overflow": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}',
    "huge-offset": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999999999999999]}}',
    "dtype": b'{"a":{"dtype":"F4_\\u0000","shape":[1],"data_offsets":[0,4]}}',
    "many": json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(400_000)}
    ).encode(),
    "long-name": json.dumps({"n" * 3_000_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode(),
    "escape": b'{"\\u001b]0;x\\u0007\\u202e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "twice": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "text": b"not JSON at all",
}
for _name, _bytes in HEADERS.items():
    PUBLICATIONS[f"header-{_name}"] = lambda _base, path, header=_bytes: _header(path, header, b"\0" * 64)
PUBLICATIONS["header-length-huge"] = lambda _base, path: _header(path, b"{}", length=1 << 62)
PUBLICATIONS["header-length-90-million"] = lambda _base, path: _header(path, b"{}", b" " * 1000, length=90_000_000)


def _special(make: Callable[[Path], object], mark: str) -> Make:
    def made(base: Path, path: Path) -> None:
        path.mkdir()
        if mark != "config.json":
            (path / "config.json").write_text(json.dumps(models.CONFIG))
        else:
            (path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
        if mark.startswith("adapter_model"):
            (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        make(path / mark)

    return made


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "socket": _socket,
    "directory": Path.mkdir,
    "itself": lambda path: path.symlink_to(path.name),
    "zero-device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "proc": lambda path: path.symlink_to("/proc/kmsg"),
    "passwd": lambda path: path.symlink_to("/etc/passwd"),
    "dangling": lambda path: path.symlink_to("nowhere"),
}
MARKS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
)
for _name, _made in SPECIAL.items():
    for _mark in MARKS:
        PUBLICATIONS[f"{_name}-{_mark}"] = _special(_made, _mark)


@_of("shards-1100")
def _shards(_base: Path, path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(models.CONFIG))
    names = {f"t{i}": f"model-{i:05d}-of-01100.safetensors" for i in range(1100)}
    for name, shard in names.items():
        save_file({name: torch.zeros(1)}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@_of("not-a-number")
def _nan(base: Path, path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")
    models.write(path, tensors)


@_of("cut")
def _cut(base: Path, path: Path) -> None:
    models.fine_tune(base, path, 5)
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(1000)


@_of("pickle")
def _pickle(_base: Path, path: Path) -> None:
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")


@_of("empty")
def _empty(_base: Path, path: Path) -> None:
    path.mkdir()


@_of("deep-folders")
def _folders(_base: Path, path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    os.mkdir(path.name, dir_fd=here)
    inner = os.open(path.name, os.O_RDONLY, dir_fd=here)
    for _ in range(600):  # deeper than a path may be long
        os.mkdir("d" * 20, dir_fd=inner)
        deeper = os.open("d" * 20, os.O_RDONLY, dir_fd=inner)
        os.close(inner)
        inner = deeper
    os.close(inner)
    os.close(here)


@_of("yaml-bomb")
def _yaml(base: Path, path: Path) -> None:
    models.fine_tune(base, path, 6)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (path / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")


def _named(name: str) -> Make:
    def make(base: Path, path: Path) -> None:
        made = models.fine_tune(base, path.with_name(f"{path.name}-made"), 7 + len(name))
        os.rename(made, os.fsencode(path.parent) + b"/" + os.fsencode(name))

    return make


NAMES = {
    "no-utf8": os.fsdecode(b"\xff\xfe-name"),
    "escape": "\x1b]0;owned\x07\x1b[2J-name",
    "line": "a\nb\r-name",
    "bidi": "\u202egnp-name",
    "long": "n" * 255,
    "percent": "%s{0}[red]$(id)-name",
}
for _name, _given in NAMES.items():
    PUBLICATIONS[f"name-{_name}"] = _named(_given)
