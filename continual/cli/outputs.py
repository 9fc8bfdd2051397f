"""The commands that read the merge: an export of it, and what each model has in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from continual.cli import console, opened
from continual.cli.flags import (
    OPENING,
    READING,
    Flags,
    Form,
    Lines,
    Only,
    ReadRule,
    ReadScale,
    RuleOptions,
    View,
    Weights,
    Without,
    takes,
)
from continual.cli.profiling import Profiled, profiled, spending, with_more
from continual.cli.profiling import told as profile_told
from continual.cli.typed import ViewFlags, rank_of
from continual.errors import Misconfigured
from continual.outside import counted
from continual.texts import figure, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from continual.engine.explaining import ExplainedModel, Explanation

app = typer.Typer(rich_markup_mode=None)
At = Annotated[
    str | None,
    typer.Option("--at", help="Record to read: its number, or a tag; default: the newest.", show_default=False),
]


@app.command()
@takes("tokenizer", *READING, *OPENING)
def export(
    directory: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    at: At = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16; default: the base's.", show_default=False),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="Largest shard, as 5GB; default: the base's.", show_default=False)
    ] = None,
    as_lora: Annotated[
        str | None,
        typer.Option(
            "--as-lora",
            metavar="RANK",
            help="Write a LoRA adapter of this rank, as near as one comes; own: of the rank that loses nothing "
            "(a state of adapters).",
            show_default=False,
        ),
    ] = None,
    form: Form = "peft",
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--earlier", help="Earlier export: of tensors that did not change its bytes are taken.", show_default=False
        ),
    ] = None,
    explained: Annotated[
        bool,
        typer.Option("--explain", help="Find what each model has in it, for continual.json, however long that takes."),
    ] = False,
    view: View = None,
    rule: ReadRule = None,
    scale: ReadScale = None,
    lines: Lines = None,
    only: Only = None,
    without: Without = None,
    weight: Weights = None,
    option: RuleOptions = None,
    profile: Profiled = False,
    *,
    flags: Flags,
) -> None:
    """Write the merged model as an ordinary model directory, or as a LoRA adapter."""
    from continual.publish import folder, lora
    from continual.publish.earlier import taken_in

    word = folder.parse_dtype(dtype)
    typed = ViewFlags(rule, scale, lines, only, without, weight, option)
    if explained and as_lora is not None:
        raise Misconfigured("--explain is for whole models: leave it out with --as-lora, or use 'continual explain'")
    if as_lora is not None and (earlier is not None or shard_size is not None):
        raise Misconfigured("--earlier and --shard-size are for whole models: leave them out with --as-lora")
    if earlier is not None and not folder.provenance_in(earlier):
        raise Misconfigured(f"--earlier {earlier}: no export of continual is there, with a continual.json")
    if as_lora is not None:
        rank = rank_of(as_lora)
        with profiled(profile) as taken, opened.merge(flags) as merge, console.progress() as progress:
            wanted = lora.LoraTarget(directory, rank, word or "F32", form, opened.seq_of(merge, at))
            report = merge.export_lora(wanted, typed.view(merge.settings, view), progress)
        spent = spending(taken, merge)
        if flags.json:
            return console.emit(with_more(report, "profile", spent))
        console.lora(report)
        return profile_told(spent)
    nbytes = folder.parse_size(shard_size)
    with profiled(profile) as taken, opened.merge(flags) as merge, console.progress() as progress:
        target = folder.Target(directory, opened.seq_of(merge, at), word, nbytes, earlier=earlier, explain=explained)
        path = merge.export(target, progress, view=typed.view(merge.settings, view))
        cut, parts = folder.cut_in(path), taken_in(folder.provenance_in(path))
    spent = spending(taken, merge)
    if flags.json:
        return console.emit(with_more({"directory": path, "cut": cut, "made": parts._asdict()}, "profile", spent))
    console.say(f"Wrote {path}")
    if earlier is not None:
        console.say(
            f"{counted(parts.made, 'tensor')} made ({size(parts.made_bytes)}), {parts.taken} taken over "
            f"({size(parts.taken_bytes)})"
        )
    console.cut(cut)
    return profile_told(spent)


@app.command()
@takes(*READING, *OPENING)
def explain(
    view: Annotated[
        str | None, typer.Argument(help="View of the settings file; default: what is in force.", show_default=False)
    ] = None,
    at: At = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, too.")] = False,
    rule: ReadRule = None,
    scale: ReadScale = None,
    lines: Lines = None,
    only: Only = None,
    without: Without = None,
    weight: Weights = None,
    option: RuleOptions = None,
    *,
    flags: Flags,
) -> None:
    """Say what each model has in the merge, over the whole and by layer; nothing is changed. Of a state of adapters it
    is exact, of a merge of whole tensors what sketches tell."""
    typed = ViewFlags(rule, scale, lines, only, without, weight, option)
    with opened.merge(flags) as merge, console.progress() as progress:
        found = merge.explain(typed.view(merge.settings, view), at=opened.seq_of(merge, at), progress=progress)
    if flags.json:
        console.emit(found)
    else:
        told(found, layers=layers)


def told(found: Explanation, *, layers: bool = False) -> None:
    """An explanation for people: the whole model, and how it spreads over the depth; `layers`: or each layer with all
    figures. What is not known of any model has no column."""
    models = [*found.models, *(one for layer in found.layers for one in layer.models)]
    exact = any(one.change is not None for one in models)
    cosines = any(one.cosine is not None for one in models)
    means = ["share: of the lengths of all task vectors"]
    if cosines:
        off = "" if found.error is None else ", an estimate, off by {:.2f}, in a layer by {:.2f}".format(*found.error)
        means.append(f"cosine: with the merge{off}")
    means += ["change: of the merge when the model is left out"] if exact else []
    console.say(
        f"Record {found.seq}, read by {found.rule}, scale {found.scale}: {counted(len(found.models), 'model')}. "
        f"{'; '.join(means)}."
    )
    console.cut(found.cut)
    head = ("share", *(("cosine",) if cosines else ()), *(("change",) if exact else ()))
    wanted = (True, cosines, exact)
    depth = f"{head[-1] if exact else 'share'} by depth, first to last layer"
    console.table(
        ("model", "record", "weight", *head, depth),
        [
            (one.name, one.seq, f"{one.weight:g}", *_figures(one, wanted), "" if layers else _by_depth(found, one))
            for one in found.models
        ],
    )
    if layers:
        console.table(
            ("layer", "depth", "model", *head),
            [
                (layer.name, f"{layer.depth:.2f}", one.name, *_figures(one, wanted))
                for layer in found.layers
                for one in layer.models
            ],
        )


def _figures(one: ExplainedModel, wanted: Sequence[bool]) -> list[str]:
    """Those of share, cosine and change that are `wanted`."""
    change = "" if one.change is None else f"{100 * one.change:.1f} %"
    cells = (f"{100 * one.norm:.1f} %", figure(one.cosine, "+.3f"), change)
    return [cell for cell, is_wanted in zip(cells, wanted, strict=True) if is_wanted]


def _by_depth(found: Explanation, one: ExplainedModel) -> str:
    """The mean change, or share where nobody knows that, in each quarter of the model that the model touched; a dash
    where it touched none."""
    quarters: list[list[float]] = [[], [], [], []]
    for layer in found.layers:
        mine = [m.norm if m.change is None else m.change for m in layer.models if m.seq == one.seq]
        quarters[min(3, int(4 * layer.depth))] += mine
    return "  ".join(f"{100 * sum(some) / len(some):.0f} %" if some else "-" for some in quarters)
