"""The tokenizer and the chat template of an export: the base's, or those of another model whose vocabulary fits.

What belongs to them goes as a whole: no file of the base's tokenizer stays beside those of another. Settings of
processors and preprocessors are the model's own and stay the base's. How a text ends belongs to the tokenizer: the ids
of special tokens in config.json and generation_config.json are those of the model that the tokenizer comes from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from continual.errors import Misconfigured, Refuse
from continual.outside import Malformed, few, parse_fields, shown
from continual.tensors import BaseModel, Place
from continual.tensors.matched.tokenizer import CLOSED, CONFIG, TOKENIZER, Tokenizer, compared, is_same
from continual.tensors.names.kinds import vocabularies

_CORES = (TOKENIZER, "vocab.json", "vocab.txt", *CLOSED)
_BESIDE = (
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.bpe",
    "normalizer.json",
    "bpe.codes",
    "dict.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "chat_templates"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MODEL, _GENERATION = "config.json", "generation_config.json"


def put_tokenizer(place: Place, base: BaseModel, directory: Path) -> None:
    """Exchanges the tokenizer in an export of `base` for that of the model at `place`.

    Raises Misconfigured where it has none, or one that does not fit the exported tables; Retry.
    """
    try:
        _put(Tokenizer(place), base, directory)
    except (Refuse, Malformed) as error:
        raise Misconfigured(f"tokenizer of {place}: {error}") from None


def _put(theirs: Tokenizer, base: BaseModel, directory: Path) -> None:
    names = theirs.place.names() if theirs.place.only is None else frozenset()
    if not any(name in names for name in _CORES):
        raise Misconfigured(
            f"tokenizer = {theirs.place}: has no tokenizer beside it ({TOKENIZER}, vocab.json or a model of "
            "SentencePiece): name a model that has one, or base"
        )
    _check_fits(theirs, base)
    for name in (*_CORES, *_BESIDE):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / _TEMPLATES, ignore_errors=True)
    for name in sorted(names.intersection((*_CORES, *_BESIDE))):
        (directory / name).write_bytes(theirs.read(name))
    templates = sorted(name for name in theirs.place.names(_TEMPLATES) if name.endswith(".jinja"))
    if templates:
        (directory / _TEMPLATES).mkdir()
    for name in templates:
        (directory / _TEMPLATES / name).write_bytes(theirs.read(f"{_TEMPLATES}/{name}"))
    _put_ids(theirs, _length(base), directory)


def _length(base: BaseModel) -> int:
    """The rows of the longest table of words."""
    words = vocabularies(base.specs)
    return max((spec.shape[0] for spec in base.specs if spec.name in words), default=0)


def _check_fits(theirs: Tokenizer, base: BaseModel) -> None:
    """Raises Misconfigured where a token has no row in the exported tables, or another row than in the base."""
    ours = Tokenizer(base.checkpoint.place)
    if is_same(ours, theirs):
        return
    found = compared(ours, theirs)
    if found is None:
        raise Misconfigured(
            f"tokenizer = {theirs.place}: it, or the base's, cannot be read (as {TOKENIZER} or vocab.json), so that "
            "nobody knows whether it fits the exported tables: name another model, or base"
        )
    before, after = found
    length = _length(base)
    beyond = [text for text, row in after.items() if row >= length]
    if beyond:
        raise Misconfigured(
            f"tokenizer = {theirs.place}: {few(map(shown, beyond))} have no row in the exported tables, which have "
            f"{length} rows: name a model with a vocabulary of that size, or base"
        )
    agreed = {row for text, row in before.items() if after.get(text) == row}
    moved = [text for text, row in before.items() if after.get(text, row) != row and row not in agreed]
    if moved:
        raise Misconfigured(
            f"tokenizer = {theirs.place}: {few(map(shown, moved))} are in other rows than in the exported tables, "
            "which have the base's: name another model, or base"
        )


def _put_ids(theirs: Tokenizer, length: int, directory: Path) -> None:
    """How a text begins, ends and is filled up, in the configurations of the export."""
    said = _json(theirs, _MODEL)
    ids = {key: said[key] for key in _IDS if _are_ids(said.get(key), length)}
    if not said and (end := _end(theirs)) is not None and end < length:
        ids = {"eos_token_id": end}
    _change(directory / _MODEL, ids)
    generation = _json(theirs, _GENERATION)
    if generation and all(_are_ids(v, length) for k, v in generation.items() if k.endswith("_token_id") and v):
        (directory / _GENERATION).write_bytes(theirs.read(_GENERATION))
    elif (directory / _GENERATION).is_file():
        _change(directory / _GENERATION, ids)


def _end(theirs: Tokenizer) -> int | None:
    """The row of the token that ends a text, as an adapter's tokenizer says it."""
    text = _json(theirs, CONFIG).get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    found = compared(theirs, theirs)
    return found[0].get(text) if found is not None and isinstance(text, str) else None


def _are_ids(value: object, length: int) -> bool:
    rows = value if isinstance(value, list) else [value]
    return bool(rows) and all(type(row) is int and 0 <= row < length for row in rows)


def _json(theirs: Tokenizer, name: str) -> Mapping[str, object]:
    return parse_fields(theirs.read(name), values=1_000_000, infinite=True) if theirs.present(name) else {}


def _change(file: Path, ids: Mapping[str, object]) -> None:
    if not ids or not file.is_file():
        return
    body = parse_fields(file.read_bytes(), infinite=True)
    for part in (body, body.get("text_config")):
        if isinstance(part, dict):
            part.update({key: value for key, value in ids.items() if part is body or key in part})
    file.write_text(json.dumps(body, indent=2) + "\n", "utf-8")
