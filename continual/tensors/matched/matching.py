"""What a candidate says about each tensor of a base: names, one differing prefix, renamings, tied names, an
adapter's pieces. From headers only, and no judgement: whether dtypes, shapes and gaps are allowed is for
gates/lineage.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from continual.errors import Refuse
from continual.records import Lineage, TensorSpec
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.adapters.pieces import Piece
from continual.tensors.adapters.pieces.scaling import Drawn
from continual.tensors.adapters.pieces.tokens import Tokens
from continual.tensors.bases.kept import or_untied
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.names.conv1d import CONV1D
from continual.tensors.names.kinds import BaseModel
from continual.tensors.names.renaming import alone, canonical, canonical_names, difference, family_of
from continual.tensors.names.tied import ties_heads


class Match(NamedTuple):
    """Where a task vector comes from. `full`: the tensor that replaces the base's. `twins`: the same tensor under tied
    names. `piece`: what an adapter adds, and `again` the same under tied names; `transposed`: the base stores that
    weight as in × out."""

    full: TensorInfo | None
    twins: tuple[TensorInfo, ...] = ()
    piece: Piece | None = None
    transposed: bool = False
    again: tuple[Piece, ...] = ()


class Naming(NamedTuple):
    """How a candidate's names become the base's: the leading part that differs, as (base's, candidate's), of the names
    as they are, or, where they are `renamed`, of their canonical forms (renaming.py)."""

    prefix: tuple[str, str] = ("", "")
    renamed: bool = False


def naming(base: BaseModel, model: Checkpoint | Adapter, where: str) -> Naming:
    """How most of a candidate's names become the base's: as they are where nothing is left over on one of the sides,
    else in the way that explains more.

    Raises Refuse (`prefix`) if two leading parts explain about as many names.
    """
    ours = [spec.name for spec in base.specs if spec.kind != "carried"]
    theirs = names_of(model)
    if (tower := _tower(base, model)) is not None:
        return tower
    ambiguous: Refuse | None = None
    plain: Naming | None = None
    try:
        plain = Naming(find_prefix(ours, theirs, where))
        met, unknown = _met(base, model, plain)
        if not unknown:
            return plain
    except Refuse as refusal:
        ambiguous, met, unknown = refusal, -1, 0
    family = family_of(base.checkpoint.config)
    short = canonical_names(ours, family)
    try:
        renamed = Naming(find_prefix(short.values(), {canonical(name, family) for name in theirs}, where), renamed=True)
    except Refuse:
        renamed = None
    if renamed is not None and (plain is None or _explains(_met(base, model, renamed), (met, unknown))):
        return renamed
    if plain is None:
        assert ambiguous is not None
        raise ambiguous
    return plain


def _tower(base: BaseModel, model: Checkpoint | Adapter) -> Naming | None:
    """The naming of one tower of the base that was published alone, or of a base that is such a tower: both towers of a
    whole model have layers of one name, so that names alone do not tell which one it is."""
    if isinstance(model, Adapter):
        return None
    theirs, ours = names_of(model), [spec.name for spec in base.specs]
    if (stem := alone(model.config)) and not any(name.startswith(stem) for name in theirs):
        return Naming((stem, "")) if any(name.startswith(stem) for name in ours) else None
    if (stem := alone(base.checkpoint.config)) and not any(name.startswith(stem) for name in ours):
        return Naming(("", stem)) if any(name.startswith(stem) for name in theirs) else None
    return None


def naming_of(lineage: Lineage) -> Naming:
    """The same, as the lineage has it."""
    return Naming(lineage.prefix, bool(lineage.renamings))


def renamings(base: BaseModel, model: Checkpoint | Adapter, names: Naming) -> tuple[tuple[str, str], ...]:
    """What of the base's names is called otherwise in the candidate, as (base's, candidate's), each once; nothing where
    a leading part says all of it."""
    if not names.renamed:
        return ()
    there = names_of(model)
    pairs = (
        (spec.name, next((name for name in row if name in there), spec.name))
        for spec, row in _named(base, model, names)[0]
    )
    return tuple(sorted({difference(ours, theirs) for ours, theirs in pairs if ours != theirs}))


def _met(base: BaseModel, model: Checkpoint | Adapter, names: Naming) -> tuple[int, int]:
    """How many tensors of the base the candidate has under these names, and how many names of it mean nothing."""
    rows, known = _named(base, model, names)
    there = names_of(model)
    return sum(any(name in there for name in row) for _, row in rows), sum(name not in known for name in there)


def _explains(renamed: tuple[int, int], plain: tuple[int, int]) -> bool:
    return renamed[0] > plain[0] or (renamed[0] == plain[0] and renamed[1] < plain[1])


def sources(base: BaseModel, model: Checkpoint | Adapter, names: Naming) -> tuple[dict[str, Match], set[str]]:
    """The source of each foldable tensor of the base that the candidate has, by the base's name; and the candidate's
    names that were understood.

    Raises Refuse (`tied`) if an adapter adapts two names of one tensor.
    """
    rows, known = _named(base, model, names)
    found: dict[str, Match] = {}
    named = {spec.name: row for spec, row in rows}
    for spec, row in rows:
        if spec.kind == "carried":
            continue
        source = _source(base, model, spec.name, row)
        if source is None and spec.name in base.untied and (spec.name.endswith(".bias") or _ties(base, model)):
            source = _source(base, model, spec.name, named[base.untied[spec.name]])
        if source is not None:
            found[spec.name] = source
    if isinstance(model, Adapter) and any(isinstance(piece, Drawn) for piece in model.pieces.values()):
        found = _widened(base, model, rows, found)
    return found, known


def _widened(
    base: BaseModel, model: Adapter, rows: Iterable[tuple[TensorSpec, list[str]]], found: Mapping[str, Match]
) -> dict[str, Match]:
    """The same with matrices as wide as the widest weight that the adapter changes, folded or not. Raises Refuse
    (`adapter-target`) where the base lacks one of them."""
    widths = {
        name: spec.shape[0 if _is_transposed(base, model, spec.name) else -1]
        for spec, row in rows
        for name in row
        if name in model.pieces and spec.shape
    }
    if lacking := sorted(model.pieces.keys() - widths.keys()):
        raise Refuse(
            "adapter-target",
            f"{model.place}: adapts {lacking[0]}, which the base does not have, and the matrices that are not in the "
            "file are as wide as all that is adapted; publish it with save_projection = true",
        )
    widest = max(widths.values())
    return {
        name: match._replace(piece=replace(match.piece, inputs=widest)) if isinstance(match.piece, Drawn) else match
        for name, match in found.items()
    }


def carried_of(base: BaseModel, model: Adapter, names: Naming) -> list[str]:
    """What an adapter brings for tensors of the base that are carried, by the adapter's names."""
    brought = {*model.pieces, *model.saved}
    rows, _ = _named(base, model, names)
    return sorted({name for spec, row in rows if spec.kind == "carried" for name in row if name in brought})


def _named(
    base: BaseModel, model: Checkpoint | Adapter, names: Naming
) -> tuple[list[tuple[TensorSpec, list[str]]], set[str]]:
    """The names that each tensor of the base may have in the candidate, the likeliest first; and all of them."""
    aliases: dict[str, list[str]] = {}
    for alias, name in base.aliases.items():
        aliases.setdefault(name, []).append(alias)
    theirs: dict[str, list[str]] = {}
    short: Mapping[str, str] = {}
    family = family_of(base.checkpoint.config)
    if names.renamed:
        short = canonical_names([spec.name for spec in base.specs], family)
        for name in sorted({*names_of(model), *(model.pieces if isinstance(model, Adapter) else ())}):
            theirs.setdefault(canonical(name, family), []).append(name)
    taken = set(short.values())
    rows: list[tuple[TensorSpec, list[str]]] = []
    known: set[str] = set()
    for spec in base.specs:
        said = [candidate_name(short.get(spec.name, spec.name), names.prefix)]
        for alias in sorted(aliases.get(spec.name, [])):
            brief = canonical(alias, family) if names.renamed else alias
            said += [candidate_name(brief, names.prefix), brief] if brief not in taken else []
        if names.renamed:
            said = [name for one in dict.fromkeys(said) for name in theirs.get(one, [])] or [spec.name]
        row = list(dict.fromkeys(said))
        known.update(row)
        rows.append((spec, row))
    return rows, known


def _source(base: BaseModel, model: Checkpoint | Adapter, ours: str, names: list[str]) -> Match | None:
    return _of_adapter(base, model, ours, names) if isinstance(model, Adapter) else _of_checkpoint(model, names)


def _ties(base: BaseModel, model: Checkpoint | Adapter) -> bool:
    """Whether a candidate has one table for two of an untied base."""
    return model.tying if isinstance(model, Adapter) else ties_heads(model.config or base.checkpoint.config)


def _of_checkpoint(model: Checkpoint, names: list[str]) -> Match | None:
    present = [model.tensors[name] for name in names if name in model.tensors]
    return Match(present[0], tuple(present[1:])) if present else None


def _of_adapter(base: BaseModel, model: Adapter, ours: str, names: list[str]) -> Match | None:
    present = [model.weights.tensors[saved] for name in names for saved in model.saved.get(name, ())]
    adapted = [name for name in names if name in model.pieces]
    pieces = [model.pieces[name] for name in adapted]
    # PEFT stores the factors of tied adapters under both names, and trained rows of a tied table always
    if len(pieces) > 1 and not model.tying and not all(isinstance(piece, Tokens) for piece in pieces):
        raise Refuse(
            "tied",
            f"{model.place}: adapts {adapted[0]} and {adapted[1]}, which are one tensor in the base; train it with "
            f"ensure_weight_tying = true{or_untied(base)}",
        )
    if not present and not adapted:
        return None
    transposed = _is_transposed(base, model, ours)
    first = pieces[0] if pieces else None
    return Match(present[0] if present else None, tuple(present[1:]), first, transposed, tuple(pieces[1:]))


def _is_transposed(base: BaseModel, model: Adapter, ours: str) -> bool:
    """Whether the base stores a weight as in × out."""
    known = CONV1D.get(str(base.checkpoint.config.get("model_type")))
    if known is None:
        return model.transposed
    return ours.split(".")[-2:-1] != [] and ours.split(".")[-2] in known


def names_of(model: Checkpoint | Adapter) -> Collection[str]:
    """The names of a candidate's tensors; an adapter's are those of the weights it changes, whatever the base has."""
    if not isinstance(model, Adapter):
        return model.tensors.keys()
    return {*(name for name, piece in model.pieces.items() if not piece.optional), *model.saved}


def candidate_name(name: str, prefix: tuple[str, str]) -> str:
    """The candidate's name for the base's tensor `name`, with the leading part that differs exchanged."""
    ours, theirs = prefix
    return theirs + name.removeprefix(ours)


def find_prefix(ours: Collection[str], theirs: Collection[str], where: str) -> tuple[str, str]:
    """The one leading part that is added or missing in the candidate's names, as (base's, candidate's); two empty
    strings where the names agree.

    Raises Refuse (`prefix`) if another prefix, or none, explains at least half as many names as the best does.
    """
    ours, theirs = set(ours), set(theirs)
    same = len(ours & theirs)
    if same == min(len(ours), len(theirs)):
        return "", ""
    counted: Counter[tuple[str, str]] = Counter({("", ""): same})
    long, wide = {len(name) for name in ours}, {len(name) for name in theirs}
    counted.update((head, "") for name in ours for head in _heads(name, theirs, wide))
    counted.update(("", head) for name in theirs for head in _heads(name, ours, long))
    (best, most), *others = counted.most_common(2)
    if others and 2 * others[0][1] >= most > 0:
        raise Refuse(
            "prefix",
            f"{where}: its names fit the base's {_said(best)} ({most} names) "
            f"and {_said(others[0][0])} ({others[0][1]}), and nothing says which is meant: load it with the class of "
            "the base, save it again, and publish that",
        )
    return best


def _heads(name: str, tails: Collection[str], lengths: Collection[int]) -> Iterator[str]:
    """What stands before those ends of a name that are among `tails`; `lengths` are those of the tails, so that nothing
    is copied for the other ends."""
    at = name.find(".")
    while at >= 0:
        if len(name) - at - 1 in lengths and name[at + 1 :] in tails:
            yield name[: at + 1]
        at = name.find(".", at + 1)


def _said(prefix: tuple[str, str]) -> str:
    ours, theirs = prefix
    return f"with {theirs!r} added" if theirs else f"without {ours!r}" if ours else "as they are"
