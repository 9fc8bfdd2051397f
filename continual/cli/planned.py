"""`continual plan`: what folding models would take; with a sample of it also the time, and what would take less."""

from __future__ import annotations

from time import process_time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from continual.cli import console, opened
from continual.cli.flags import GATES, MACHINE, OPENING, Flags, RuleOptions, rules_named, takes
from continual.cli.profiling import with_more
from continual.cli.typed import parse_options
from continual.errors import Misconfigured
from continual.texts import duration, size

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.engine.outcomes import Plan
    from continual.forecast.forecast import Forecast
    from continual.forecast.outlook import Outlook

UNTOLD = "time is said of full fine-tunes alone, in states of whole tensors, by rules that take nothing but weights"
app = typer.Typer(rich_markup_mode=None)


@app.command()
@takes(*GATES, *MACHINE, *OPENING)
def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Directories of fine-tunes or adapters, or repos (hf://ORG/NAME@REVISION)."),
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Try a small sample, and say what a fold and an export take by it.")
    ] = False,
    init: Annotated[
        str | None,
        typer.Option("--init", help="Say it of a state of this base, of which headers will do.", show_default=False),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", help="With --init: its rule.", show_default=False, autocompletion=rules_named),
    ] = None,
    option: RuleOptions = None,
    *,
    flags: Flags,
) -> None:
    """Say from headers alone what folding models would take, and whether they would be let in."""
    if init is not None:
        if models:
            raise Misconfigured("plan: --init is about a fine-tune of all of that base; leave the models out")
        return _of_base(init, rule, option or [], flags)
    if not models:
        raise Misconfigured("plan: name models, or a base with --init")
    if rule is not None or option:
        raise Misconfigured("plan: --rule and --option are for --init; a state has its own")
    plans(models, flags, time=time)


def _of_base(init: str, rule: str | None, option: list[str], flags: Flags) -> None:
    from continual import lazily, making
    from continual.forecast import outlook

    lazily.load()
    settings = opened.settings(flags)
    recipe = making.recipe_for(settings, rule=rule, options=parse_options(option))
    with console.spinner("trying a sample"):
        found = outlook.of_base(init, recipe, settings, process_time(), flags.client)
    if flags.json:
        console.emit(found)
    else:
        told(init, found)


def plans(models: list[str], flags: Flags, *, time: bool = False) -> NoReturn:
    """Prints what folding models would take, with `time` by a sample; exits."""
    with opened.merge(flags) as merge:
        opening = process_time() if time else None
        found = [_planned(merge, model, opening) for model in models]
    if flags.json:
        console.emit([with_more(one, "time", seen) for one, seen in found])
    else:
        console.plans([one for one, _ in found])
        for one, seen in found:
            if seen is not None:
                told(one.name, seen)
            elif time and one.ok:
                console.warn(f"{one.name}: {UNTOLD}")
    raise typer.Exit(0 if all(one.ok or one.reason == "known" for one, _ in found) else 1)


def _planned(merge: Merge, model: str, opening: float | None) -> tuple[Plan, Outlook | None]:
    if opening is None:
        return merge.plan(model), None
    from continual.forecast import outlook

    with console.spinner("trying a sample"):
        return outlook.planned(merge, model, opening)


def told(name: str, found: Outlook) -> None:
    """An outlook for people."""
    console.say("")
    console.say(
        f"{name}, rule {found.rule}: a generation takes {size(found.state_bytes)}, all that is kept at most "
        f"{size(found.kept_bytes)}"
    )
    both = (("fold", found.fold), ("export", found.export))
    head = ("", "seconds", "CPU", "memory", "disk", "read", "written", "CPU by stage (of fsync wall seconds)")
    console.table(head, [_row(work, one) for work, one in both])
    for work, one in both:
        dearest = ", ".join(f"{tensor} {_brief(seconds)}" for tensor, seconds in one.dearest[:3])
        console.say(f"dearest of the {work}, CPU seconds: {dearest}")
    console.say("cheaper would be:")
    console.table(("what", "then"), [(one.change, one.gain) for one in found.cheaper])


def _row(work: str, one: Forecast) -> tuple[object, ...]:
    stages = ", ".join(f"{stage} {_brief(seconds)}" for stage, seconds in one.stages.items() if seconds >= 0.01)
    room = (size(one.memory_bytes), size(one.disk_bytes), size(one.read_bytes), size(one.written_bytes))
    return work, _said(one.seconds), _said(one.cpu_seconds), *room, stages


def _brief(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 100 else f"{seconds:.0f}"


def _said(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 600 else duration(seconds)
