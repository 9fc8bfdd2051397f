"""The config.json of an export: the base's, but for what the export changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from continual.errors import Misconfigured
from continual.outside import Malformed, parse_fields, read_regular

WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""How people and configurations call the dtypes of an export."""
_SMALL = 64 << 20


def untie_config(config: Path) -> None:
    """Makes the exported config.json say that embedding and head are two tables. Raises Misconfigured where it is no
    valid JSON."""
    body: dict[str, object] = {}
    if config.is_file():
        body = _read(config)
    for part in (body, body.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    config.write_text(json.dumps(body, indent=2) + "\n", "utf-8")


def set_config_dtype(config: Path, dtype: str | None) -> None:
    """Makes the exported config.json name the dtype the weights now have, also in the configs of its parts."""
    if dtype is None or not config.is_file():
        return
    body = _read(config)
    name = next(word for word, short in WORDS.items() if short == dtype)
    for part in _parts(body):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str):
                part[key] = name
    config.write_text(json.dumps(body, indent=2) + "\n", "utf-8")


def _parts(body: dict[str, object]) -> Iterator[dict[str, object]]:
    """A config, and the configs in it: of the text, of pictures, of sound."""
    yield body
    for key, value in body.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from _parts(value)


def _read(config: Path) -> dict[str, object]:
    try:
        return parse_fields(read_regular(config, _SMALL), infinite=True)
    except Malformed as error:  # the base's was read when it was opened; somebody has changed it since
        raise Misconfigured(f"{config.name} of the base: no valid JSON ({error})") from None
