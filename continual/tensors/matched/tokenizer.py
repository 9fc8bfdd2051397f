"""Which token each row of a model's vocabulary belongs to, as the files of its tokenizer say. They are read as data.

A tokenizer has a core (`tokenizer.json`, or the `vocab.json` or `vocab.txt` of older ones) and tokens that were added
later. A core in a form that is not read here (`tokenizer.model`) still says something where two models have the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from continual.errors import Refuse
from continual.outside import Malformed, parse_fields
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.checkpoints.compound import Part
from continual.tensors.checkpoints.place import Place

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_LISTS = ("vocab.json", "vocab.txt")
CLOSED = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
"""Cores of SentencePiece."""
_TWO = ("target_vocab.json", "vocab-src.json", "tokenizer_2.json")
"""Files of tokenizers with a vocabulary for each of two languages."""
_VALUES = 2_000_000
_LARGEST = 1 << 31
_MERGES = re.compile(
    rb'(?<!\\)"merges"\s*+:\s*+(\[(?:[^\[\]"]++|"(?:[^"\\]++|\\.)*+"|\[(?:[^\[\]"]++|"(?:[^"\\]++|\\.)*+")*+\])*+\])',
    re.DOTALL,
)
_MERGES_BEGIN = re.compile(rb'(?<!\\)"merges"\s*+:\s*+\[')


class Vocabulary(NamedTuple):
    """The row of each token, by its text: of the `core`, and of tokens that were `added`. `closed`: the digest of a
    core that is not read."""

    core: Mapping[str, int]
    added: Mapping[str, int]
    closed: str | None = None


class Tokenizer(NamedTuple):
    """Where a model's tokenizer is: its place, and the folder in it."""

    place: Place
    folder: str = ""

    def file(self, name: str) -> str:
        """The path of a file of it."""
        return Part(self.folder, "").name(name)

    def present(self, name: str) -> bool:
        """Whether it has a file of this name. Raises Retry."""
        return self.place.only is None and self.place.present(self.file(name))

    def read(self, name: str) -> bytes:
        """The contents. Raises Malformed where it is too large or no file, Retry."""
        try:
            return self.place.small(self.file(name))
        except Refuse as refusal:
            raise Malformed(str(refusal)) from None


def tokenizer_of(model: Checkpoint | Adapter, part: Part) -> Tokenizer:
    """The tokenizer of the tables in a folder of a base, in the base or a candidate: in that folder where the candidate
    has it, beside a text encoder of diffusers, else at the top. Raises Retry."""
    text = part.folder.startswith("text_encoder")
    folder = part.folder.replace("text_encoder", "tokenizer", 1) if text else part.folder
    return Tokenizer(model.place, folder if folder and model.place.only is None and model.place.names(folder) else "")


def is_same(ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Whether two tokenizers are the same, byte by byte, as far as rows go. Raises Retry."""
    for name in (TOKENIZER, *_LISTS, *CLOSED, ADDED, CONFIG):
        there = ours.present(name), theirs.present(name)
        if there[0] != there[1] or (there[0] and _small(ours, name) != _small(theirs, name)):
            return False
        if name == TOKENIZER and there[0]:
            return True  # it has the added tokens as well
    return False


def compared(ours: Tokenizer, theirs: Tokenizer) -> tuple[Mapping[str, int], Mapping[str, int]] | None:
    """The rows of the tokens of two models; None where the tokenizer of one cannot be read, or where two cores that are
    not read differ. Raises Retry."""
    one, other = vocabulary(ours), vocabulary(theirs)
    if one is None or other is None:
        return None
    if one.closed is None and other.closed is None:
        return {**one.core, **one.added}, {**other.core, **other.added}
    shut = _closed_of(ours), _closed_of(theirs)
    if shut[0] is None or shut[0] != shut[1]:
        return None
    core = one.core or other.core  # the same core: one of the models may have it in a form that is read
    return {**core, **one.added}, {**core, **other.added}


def vocabulary(tokenizer: Tokenizer) -> Vocabulary | None:
    """The tokens of a tokenizer; None where there is none, or none that is read here. Raises Retry."""
    if any(tokenizer.present(name) for name in _TWO):
        return None
    try:
        return _read(tokenizer)
    except Malformed:
        return None


def _read(tokenizer: Tokenizer) -> Vocabulary | None:
    """Raises Malformed and Retry."""
    words, lines = _LISTS
    later = dict(_added(tokenizer))
    if tokenizer.present(TOKENIZER):
        core, more = _tokenizer(tokenizer.read(TOKENIZER))
        later |= more
    elif tokenizer.present(words):
        core = _rows(parse_fields(tokenizer.read(words), values=_VALUES))
    elif tokenizer.present(lines):
        texts = tokenizer.read(lines).decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
        core = {text.removesuffix("\r"): row for row, text in enumerate(texts)}
    else:
        closed = _closed_of(tokenizer)
        return None if closed is None else Vocabulary({}, later, closed)
    return Vocabulary(core, {text: row for text, row in later.items() if text not in core})


def _closed_of(tokenizer: Tokenizer) -> str | None:
    """The digest of the core that is not read here."""
    name = next((name for name in CLOSED if tokenizer.present(name)), None)
    data = None if name is None else _small(tokenizer, name)
    return None if data is None else hashlib.sha256(data).hexdigest()


def _small(tokenizer: Tokenizer, name: str) -> bytes | None:
    try:
        return tokenizer.read(name)
    except Malformed:
        return None


def _tokenizer(data: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """The tokens of a `tokenizer.json`: of its model, and those that were added. Raises Malformed."""
    if len(_MERGES_BEGIN.findall(data)) == 1:  # by far the longest part, of which nothing is needed
        data = _MERGES.sub(b'"merges":[]', data, count=1)
    body = parse_fields(data, values=_VALUES, infinite=True)
    model, added = body.get("model"), body.get("added_tokens") or []
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):  # Unigram: pieces with their scores
        pieces = [entry[0] if isinstance(entry, list) and entry else None for entry in words]
        words = {piece: row for row, piece in enumerate(pieces) if isinstance(piece, str)}
    if not isinstance(words, dict) or not isinstance(added, list):
        raise Malformed("no vocabulary")
    more = {str(entry.get("content")): entry.get("id") for entry in added if isinstance(entry, dict)}
    return _rows(words), _rows(more)


def _added(tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """The tokens that stand in other files than the core, with their rows. Raises Malformed and Retry."""
    if tokenizer.present(CONFIG):
        body = parse_fields(tokenizer.read(CONFIG), values=_VALUES, infinite=True).get("added_tokens_decoder")
        for row, entry in body.items() if isinstance(body, dict) else ():
            text = entry.get("content") if isinstance(entry, dict) else None
            if isinstance(text, str) and row.isascii() and row.isdigit() and len(row) < 10:
                yield text, int(row)
    if tokenizer.present(ADDED):
        yield from _rows(parse_fields(tokenizer.read(ADDED), values=_VALUES)).items()


def _rows(body: Mapping[str, object]) -> dict[str, int]:
    """Raises Malformed for what is no row."""
    if any(type(row) is not int or not 0 <= row < _LARGEST for row in body.values()):
        raise Malformed("a row that is no number")
    return {text: row for text, row in body.items() if isinstance(row, int)}
