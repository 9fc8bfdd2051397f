"""Which rows of a candidate's vocabulary tables belong to which of the base's: by their places, or by the texts of
their tokens where both tokenizers are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from continual.errors import Refuse
from continual.outside import shown
from continual.records import TensorSpec, TokenRows
from continual.tensors import Adapter, BaseModel, Checkpoint
from continual.tensors.adapters.pieces.tokens import Tokens
from continual.tensors.matched.matching import Match
from continual.tensors.matched.row_order import moved_of
from continual.tensors.matched.tokenizer import Tokenizer, compared, is_same, tokenizer_of
from continual.tensors.names.kinds import is_positions, vocabularies

_OTHER_SIZE = "not a fine-tune of this base, or one whose layers were made larger or smaller"
_RESIZED = (
    "its table of positions was resized (another max_position_embeddings or image_size), and what was trained with it "
    "is not merged with a base of the old size"
)
Setting = Literal["refuse", "common-rows", "by-token"]


class Table(NamedTuple):
    """A vocabulary's table of the base, and the candidate's: how many rows that has, and what a message says of it."""

    spec: TensorSpec
    rows: int
    said: str


class Corresponding(NamedTuple):
    """How rows correspond, as `Lineage` has it."""

    rows: dict[str, int]
    tokens: tuple[TokenRows, ...]


def tables_of(
    model: Checkpoint | Adapter, specs: Mapping[str, TensorSpec], found: Mapping[str, Match]
) -> dict[str, Table]:
    """The vocabulary's tables that the candidate changes.

    Raises Refuse (`shape`) for any other tensor that has not the base's shape.
    """
    tables: dict[str, Table] = {}
    words = vocabularies(specs.values())
    for name, source in found.items():
        spec = specs[name]
        shape, said = spec.shape, f"{model.place}: {name}"
        if source.full is not None:
            shape = source.full.shape
            said = (
                f"{model.place}: tensor {source.full.name} has shape {list(shape)}, the base's has {list(spec.shape)}"
            )
        if source.piece is not None:
            changed = source.piece.names[0]
            fitting = source.piece.fit(name, shape, transposed=source.transposed)
            if source.full is not None and fitting != shape:
                raise Refuse(
                    "shape",
                    f"{model.place}: {changed} changes rows of a table of {fitting[0]} rows, "
                    f"and {source.full.name} beside it has {shape[0]}: files of two adapters; publish one",
                )
            if source.full is None:
                said = f"{model.place}: what {changed} changes has shape {list(fitting)}, {name} is {list(spec.shape)}"
            shape = fitting
        is_table = bool(shape) and bool(spec.shape) and shape[1:] == spec.shape[1:] and name in words
        if shape != spec.shape and not is_table:
            raise Refuse("shape", f"{said}: {_RESIZED if is_positions(name) else _OTHER_SIZE}")
        if is_table:
            tables[name] = Table(spec, shape[0], said)
    return tables


def corresponding(
    base: BaseModel, model: Checkpoint | Adapter, tables: Mapping[str, Table], vocab: Setting, *, again: bool = False
) -> Corresponding:
    """How the rows of these tables correspond. `again`: the candidate was let in before, and is not judged anew.

    Raises Refuse (`vocab`) where the setting does not let another vocabulary in, where tokens lie in other rows than in
    the base and they are not matched by their texts, and where that is asked for and a tokenizer cannot be read; Retry.
    """
    found = Corresponding({}, ())
    pairs: dict[tuple[Tokenizer, Tokenizer], list[str]] = {}
    for name in tables:
        part = base.checkpoint.part_of(base.checkpoint.tensors[name])
        pairs.setdefault((tokenizer_of(base.checkpoint, part), tokenizer_of(model, part)), []).append(name)
    for (ours, theirs), names in pairs.items():
        some = {name: tables[name] for name in names}
        if again and vocab != "by-token":
            found.rows.update(_in_place(some))
            continue
        known = None if is_same(ours, theirs) else compared(ours, theirs)
        if vocab == "by-token" and not is_same(ours, theirs):
            found = _by_token(found, model, some, known)
        else:
            _check_places(str(model.place), some, known, vocab)
            found.rows.update(_in_place(some))
    return found


def check_pieces(model: Adapter, found: Mapping[str, Match], tokens: Sequence[TokenRows]) -> None:
    """Raises Refuse (`vocab`) where what an adapter adds to a table depends on rows of it that the base does not
    have."""
    for name, rows in moved_of(tokens).items():
        source = found.get(name)
        piece = source.piece if source is not None and source.full is None else None
        known = sum(count for _, _, count in rows.runs)
        if piece is not None and piece.needs_base and not isinstance(piece, Tokens) and known < rows.theirs:
            raise Refuse(
                "vocab",
                f"{model.place}: {piece.names[0]} changes a table by all of its rows, and the base lacks "
                f"{rows.theirs - known} of them: merge the adapter into its base and publish that",
            )


def _in_place(tables: Mapping[str, Table]) -> dict[str, int]:
    """The rows in common of the tables of another size."""
    return {n: min(t.rows, t.spec.shape[0]) for n, t in tables.items() if t.rows != t.spec.shape[0]}


def _check_places(
    where: str,
    tables: Mapping[str, Table],
    known: tuple[Mapping[str, int], Mapping[str, int]] | None,
    vocab: Setting,
) -> None:
    """Raises Refuse (`vocab`)."""
    resized = next((table for table in tables.values() if table.rows != table.spec.shape[0]), None)
    for name, table in tables.items() if known is not None else ():
        assert known is not None
        elsewhere = _elsewhere(*known, table) if _is_of(known[0], table.spec.shape[0]) else []
        if not elsewhere:
            continue
        text = elsewhere[0]
        raise Refuse(
            "vocab",
            f"{where}: its tokenizer has tokens in other rows of {name} than the base's ({len(elsewhere)}): "
            f"'{shown(text)}' is in row {known[1][text]}, and in row {known[0][text]} there; vocab = by-token folds "
            "each row into that of the same token",
            by=("vocab",),
        )
    if resized is not None and vocab == "refuse":
        raise Refuse(
            "vocab",
            f"{resized.said}: its vocabulary was resized; "
            + (
                "vocab = by-token folds the rows whose tokens both have, by their tokenizers"
                if known is not None
                else "vocab = common-rows folds the rows both have"
            ),
            by=("vocab",),
        )


def _is_of(tokens: Mapping[str, int], length: int) -> bool:
    """Whether a table of this length is that of a tokenizer: another table, as of sounds, may have a name of words."""
    return 10 * sum(row < length for row in tokens.values()) >= 9 * len(tokens)


def _elsewhere(ours: Mapping[str, int], theirs: Mapping[str, int], table: Table) -> list[str]:
    """The tokens of two tokenizers that lie in different rows; a row that has several texts agrees by one of them."""
    agreed = {row for text, row in ours.items() if theirs.get(text) == row}
    return [
        text
        for text, row in ours.items()
        if (there := theirs.get(text, row)) != row
        and row not in agreed
        and row < table.spec.shape[0]
        and there < table.rows
    ]


def _by_token(
    found: Corresponding,
    model: Checkpoint | Adapter,
    tables: Mapping[str, Table],
    known: tuple[Mapping[str, int], Mapping[str, int]] | None,
) -> Corresponding:
    """What was found, and how the rows of these tables correspond by the texts of their tokens."""
    if known is None:
        for table in tables.values():
            if table.rows != table.spec.shape[0]:
                raise Refuse(
                    "vocab",
                    f"{table.said}, and vocab = by-token needs the tokenizers of both (tokenizer.json): the model or "
                    "its base has none that can be read; publish it beside the weights, or set vocab = common-rows",
                    by=("vocab",),
                )
        return found
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, table in tables.items():
        sizes.setdefault((table.spec.shape[0], table.rows), []).append(name)
    tokens = list(found.tokens)
    for (ours, theirs), names in sizes.items():
        if not _is_of(known[0], ours):
            found.rows.update(_in_place({name: tables[name] for name in names}))
            continue
        rows = token_rows(tuple(sorted(names)), *known, ours, theirs)
        if not rows.runs:
            raise Refuse(
                "vocab",
                f"{model.place}: its tokenizer has no token in common with the base's: it is no "
                "fine-tune of this base, or has the tokenizer of another model beside it",
            )
        if not rows.moved:
            found.rows.update(_in_place({name: tables[name] for name in names}))
        if rows.moved or rows.left_out or rows.lacking:
            tokens.append(rows)
    return Corresponding(found.rows, tuple(tokens))


def token_rows(
    tables: tuple[str, ...], ours: Mapping[str, int], theirs: Mapping[str, int], length: int, size: int
) -> TokenRows:
    """How the rows of tables of `length` rows in the base and `size` in the candidate correspond. `ours`, `theirs`: the
    rows of the tokens. A row without a token in both is the same row in both."""
    there: dict[int, int] = {}
    for text, row in ours.items():
        other = theirs.get(text, size)
        if other < size and (row not in there or other == row):
            there[row] = other  # a row that has several texts stays where it is, if one of them lets it
    named = {*ours.values(), *theirs.values()}
    runs: list[list[int]] = []
    for row in range(length):
        other = there.get(row, row if row < size and row not in named else -1)
        if other < 0:
            continue
        if runs and runs[-1][0] + runs[-1][2] == row and runs[-1][1] + runs[-1][2] == other:
            runs[-1][2] += 1
        else:
            runs.append([row, other, 1])
    return TokenRows(
        tables,
        length,
        size,
        tuple((first, other, count) for first, other, count in runs),
        left_out=tuple(text for text, row in sorted(theirs.items(), key=_row) if row < size and text not in ours),
        lacking=tuple(text for text, row in sorted(ours.items(), key=_row) if row < length and row not in there),
    )


def _row(item: tuple[str, int]) -> tuple[int, str]:
    return item[1], item[0]
