"""Making a state: what it is to be (`Recipe`), what a base would make of it (`survey`), and the state itself (`init`).

An open state is `continual.api.Merge`. How a state lies on disk is the matter of `continual.state`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from continual.blocks import slots
from continual.config import Settings
from continual.engine.base import Fetched, fetched, files_of, measure_base, open_checkpoint, open_headers
from continual.engine.needs import state_bytes
from continual.errors import Misconfigured, Retry
from continual.executors.contract import Progress, silent
from continual.hub import Repo
from continual.hub.locate import Places
from continual.records import Kind, SlotSpec
from continual.rules import ReadAs, ReadOptions, must_keep_adapters, read_as, read_options, reader, rule
from continual.state import Format, State
from continual.state.format import AdaptersForm, BaseRecord, HeaderRecord
from continual.stores import Where, where
from continual.tensors import BaseModel, Checkpoint, Folder, Place, describe
from continual.tensors.bases.kept import config_text
from continual.tensors.names.tied import can_untie, untied
from continual.tensors.vectors.thin import sides_of

if TYPE_CHECKING:
    from continual.hub import Hub

DEFAULT = "tsv-flow"
"""The rule of a state of whole tensors, unless the recipe names another (ops/decisions/0099)."""
OF_ADAPTERS = "tsv-even"
"""That of a state that keeps adapters (ops/decisions/0109)."""
WIDTH = 256
"""Singular triplets of a layer that a state of adapters keeps, unless the recipe says otherwise: sixteen adapters of
rank 16, or thirty-two of rank 8, are kept whole."""
MOST_COLUMNS = 1 << 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a new state is to be.

    `rule` names the fold rule; None takes `DEFAULT` or `OF_ADAPTERS`. `options` are its fold-time options, by name;
    they become part of the state and never change, as do `plain` and `exclude`: globs of tensor names. Tensors that
    match `plain` are folded by the rule's plain form, those that match `exclude` are copied from the base untouched.
    `scale` says how long the merged task vector is read (`norm`, `norm:KAPPA`, a number or `auto`), `lines` how the
    layers are scaled (`ALPHA:BETA`); both can be changed later, and None takes the rule's default. `reading` names the
    rule that reads the merge, where that is another; it can be changed later too. `untie` gives an output head that is
    tied to the input embedding a tensor of its own: fine-tunes can then change one of the two, and an export has both.
    `width`: the state keeps adapters as they are, at most so many singular triplets a layer, and `rule` is what is made
    of them when they are read; None: it keeps a merge of whole tensors.
    """

    rule: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    scale: str | None = None
    lines: str | None = None
    plain: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    untie: bool = False
    width: int | None = None
    reading: str | None = None

    @property
    def rule_name(self) -> str:
        """The fold rule of the state."""
        return self.rule or (DEFAULT if self.width is None else OF_ADAPTERS)

    def read(self) -> ReadOptions:
        """How the merge is read at first. Raises Misconfigured for what is unknown or malformed, and a rule that cannot
        read such a state."""
        made, blocks = rule(self.rule_name, self.options), self.width is not None
        default = read_options(self.rule_name)
        reader(made, self.reading or self.rule_name, blocks=blocks)
        return read_as(made, default, ReadAs(self.reading, self.scale, self.lines), blocks=blocks)[1]


@dataclass(frozen=True, slots=True)
class Survey:
    """What a state of a base holds.

    `base` is where the base is; `rule`, `options`, `scale` and `lines` are those of the recipe, with their defaults.
    `state_bytes` is the size of one generation, and of a state that keeps adapters (`width`) the most that one takes.
    `kinds` has a row for each kind of tensor: the kind (`matrix`, `stack`, `plain` or `carried`), how many tensors
    there are of it, and how many parameters they have. `tensors` has the kind of each tensor, by name; `aliases` the
    name under which a tied tensor is kept, by its other name. `packed`: how the base of a state that keeps adapters is
    quantised, where it is.
    """

    base: str
    rule: str
    options: Mapping[str, object]
    scale: str
    lines: tuple[float, float] | None
    state_bytes: int
    kinds: tuple[tuple[str, int, int], ...]
    tensors: Mapping[str, str]
    aliases: Mapping[str, str]
    width: int | None = None
    packed: str | None = None


def survey(base: str | Path, recipe: Recipe | None = None, *, client: Hub | None = None) -> Survey:
    """Says what `init` would make of `base`. Reads headers only; of a repo on the Hub nothing else is fetched.

    Raises Misconfigured, Refuse and Retry, as `init` does.
    """
    recipe = recipe or Recipe()
    place = Places(Settings(), client=client).named(base)
    opened, form = (open_checkpoint(place), None) if recipe.width is None else open_headers(place)
    with opened as checkpoint:
        return _survey(str(checkpoint.place), _described(checkpoint, recipe), recipe, form)


def init(
    base: str | Path,
    state: str | Where,
    recipe: Recipe | None = None,
    *,
    progress: Progress = silent,
    client: Hub | None = None,
) -> Survey:
    """Makes a state in the directory `state` for `base`: a model directory, or a repo of the Hub
    (`ORG/NAME@REVISION`).

    Reads the base once, for its digests and norms. A repo is first fetched into the cache of the Hub's client, and its
    commit is written down. `client` is asked in place of the Hub that the environment names.

    Raises Misconfigured for an unknown rule or option and for a directory that is taken, Refuse for a base that cannot
    be read, Retry where the network or the disk gets in the way.
    """
    recipe = recipe or Recipe()
    chosen = rule(recipe.rule_name, recipe.options)  # before anything is fetched
    if recipe.width is None:
        must_keep_adapters(chosen)
    place = Places(Settings(), client=client).named(base)
    if recipe.width is not None:
        return _init_adapters(place, base, where(state), recipe)
    found = _found(place, base, progress)
    with open_checkpoint(found.place) as checkpoint:
        model = _described(checkpoint, recipe)
        made = _survey(found.name, model, recipe)
        measured = measure_base(model, progress)
        remote = found.remote
        record = BaseRecord(
            path=str(found.path),
            repo=remote.repo if remote else None,
            revision=remote.revision if remote else None,
            licence=remote.licence if remote else None,
            files=files_of(checkpoint),
            digests=measured.digests,
            squares=measured.squares,
            plain=recipe.plain,
            exclude=recipe.exclude,
        )
        checkpoint.check_unchanged()
    slots = {spec.name: chosen.slots(spec) if spec.kind != "carried" else {} for spec in model.specs}
    State.create(
        where(state),
        Format.new(record, model.specs, recipe.rule_name, chosen.options, slots),
        read=recipe.read().to_mapping(),
        device="cpu",
    ).close()
    return made


def _init_adapters(place: Place, base: str | Path, state: Where, recipe: Recipe) -> Survey:
    """`init` for adapters that are kept as they are: nothing of the base is read but its headers and config.json.
    Raises as `init`."""
    opened, form = open_headers(place)
    with opened as checkpoint:
        model = _described(checkpoint, recipe)
        made = _survey(str(base), model, recipe, form)
        remote = place.info if isinstance(place, Repo) else None
        record = BaseRecord(
            path=str(place.path.resolve()) if isinstance(place, Folder) else "",
            repo=remote.id if remote else None,
            revision=remote.sha if remote else None,
            licence=(remote.licence or None) if remote else None,
            files=files_of(checkpoint),
            digests={},
            squares={},
            plain=recipe.plain,
            exclude=recipe.exclude,
            headers={name: HeaderRecord(info.dtype, info.shape) for name, info in checkpoint.tensors.items()},
            aliases=model.aliases,
            config=config_text(checkpoint),
            packed=form,
        )
        checkpoint.check_unchanged()
    assert recipe.width is not None
    State.create(
        state,
        Format.new(
            record, model.specs, made.rule, made.options, _blocks(model, recipe.width), AdaptersForm(recipe.width)
        ),
        read=recipe.read().to_mapping(),
        device="cpu",
    ).close()
    return made


def _check_adapters(model: BaseModel, recipe: Recipe) -> None:
    """Raises Misconfigured for what a state that keeps adapters cannot be."""
    if not 1 <= (recipe.width or 0) <= MOST_COLUMNS:
        raise Misconfigured(f"width = {recipe.width}: a layer has 1 to {MOST_COLUMNS} singular triplets")
    chosen = rule(recipe.rule_name, recipe.options)
    if chosen.needs.shipped is not None:
        raise Misconfigured(
            f"rule = {chosen.name}: it weighs each parameter by {chosen.needs.shipped} beside a full fine-tune, which "
            "adapters do not have: take another rule"
        )
    if recipe.untie:
        raise Misconfigured("tied = untie: a state that keeps adapters keeps tied tables as one; leave it out")
    if any(part.folder for part in model.checkpoint.parts):
        raise Misconfigured(
            f"{model.checkpoint.place} lies in several folders, and a state of adapters is of one: name the folder of "
            "the component that they adapt"
        )


def _blocks(model: BaseModel, width: int) -> dict[str, dict[str, SlotSpec]]:
    """What is kept of each tensor of a base where adapters are kept as they are."""
    found: dict[str, dict[str, SlotSpec]] = {}
    for spec in model.specs:
        layers = spec.layers
        kept = slots(*sides_of(layers[0].shape), width) if layers else {}
        found |= {layer.name: kept for layer in layers} or {spec.name: kept}
    return found


def _most_bytes(model: BaseModel, width: int) -> int:
    """Bytes of a generation in which every layer has as many triplets as it keeps."""
    return sum(slot.nbytes for kept in _blocks(model, width).values() for slot in kept.values())


def recipe_for(
    settings: Settings,
    *,
    rule: str | None = None,
    options: Mapping[str, object] | None = None,
    before: Sequence[str] | None = None,
) -> Recipe:
    """A recipe with the rule, the options and the transforms before a fold (`before`) that the settings name. What is
    given here wins over the settings; an option that is given is added to theirs."""
    transforms = list(before or settings.before or ())
    asked = {**settings.options, **(options or {}), **({"before": transforms} if transforms else {})}
    name = rule or settings.rule or ("frank-wolfe" if settings.select == "frank-wolfe" else None)
    return Recipe(rule=name, options=asked, untie=settings.tied == "untie", reading=settings.reading)


def _described(checkpoint: Checkpoint, recipe: Recipe) -> BaseModel:
    """The base as the recipe has it. Raises Misconfigured where a head is to be untied and none is tied."""
    heads = untied(checkpoint) if recipe.untie else {}
    if heads and not can_untie(checkpoint.config):
        family = checkpoint.config.get("model_type")
        raise Misconfigured(
            f"tied = untie: {checkpoint.place}: a {family} divides what its head is given only while its tables are "
            "tied, so that a merge with two tables would answer otherwise: leave the setting out"
        )
    if recipe.untie and not heads:
        raise Misconfigured(f"tied = untie: no output head of {checkpoint.place} is tied to its input embedding")
    return describe(
        checkpoint, plain=recipe.plain, exclude=recipe.exclude, tables=heads, sampled=recipe.width is not None
    )


@contextlib.contextmanager
def described(base: str | Path, recipe: Recipe, *, client: Hub | None = None) -> Iterator[BaseModel]:
    """A base as a state of whole tensors would have it, by its headers. Raises as `survey`."""
    must_keep_adapters(rule(recipe.rule_name, recipe.options))
    with open_checkpoint(Places(Settings(), client=client).named(base)) as checkpoint:
        yield _described(checkpoint, recipe)


class _Found(NamedTuple):
    """A base that lies on this machine: its directory, the path that the state keeps, its name for people, and where it
    came from if that was the Hub."""

    place: Folder
    path: Path
    name: str
    remote: Fetched | None = None


def _found(place: Place, word: str | Path, progress: Progress) -> _Found:
    if isinstance(place, Repo):
        with contextlib.suppress(Retry):  # who cannot be read by ranges is fetched, and looked at then
            open_checkpoint(place).close()  # what its headers refuse, as quantised weights, is not fetched for nothing
        remote = fetched(place.hub, place.info.id, place.info.sha, progress)
        return _Found(Folder(remote.path), remote.path.absolute(), f"{remote.repo}@{remote.revision}", remote)
    assert isinstance(place, Folder)
    return _Found(place, place.path.resolve(), str(word))


def _survey(base: str, model: BaseModel, recipe: Recipe, form: str | None = None) -> Survey:
    if recipe.scale == "tuned":
        raise Misconfigured(
            "scale = tuned: nothing is folded yet to tune; make the state with another, fold, and run 'continual tune'"
        )
    if recipe.width is not None:
        _check_adapters(model, recipe)
    chosen, read = rule(recipe.rule_name, recipe.options), recipe.read()
    if recipe.width is None:
        must_keep_adapters(chosen)
    counted = {kind: [spec.numel for spec in model.specs if spec.kind == kind] for kind in get_args(Kind)}
    return Survey(
        base=base,
        rule=recipe.rule_name,
        options=chosen.options,
        scale=str(read),
        lines=read.lines,
        state_bytes=state_bytes(chosen, model.specs) if recipe.width is None else _most_bytes(model, recipe.width),
        kinds=tuple((kind, len(sizes), sum(sizes)) for kind, sizes in counted.items()),
        tensors={spec.name: spec.kind for spec in model.specs},
        aliases=model.aliases,
        width=recipe.width,
        packed=form,
    )
