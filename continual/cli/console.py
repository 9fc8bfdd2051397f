"""What the commands print: tables and progress for people, one JSON document for machines. How a single value is
written is in `continual.texts`; what is printed, the command decides."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from continual.outside import counted, few
from continual.texts import figure, jsonable, plain, size, when

if TYPE_CHECKING:
    from continual.engine.block_reading import CutModel
    from continual.engine.outcomes import Outcome, Plan
    from continual.executors.contract import Progress
    from continual.publish.lora import LoraReport
    from continual.rules import ReadOptions
    from continual.rules.catalogue import RuleInfo, TransformInfo
    from continual.selection import Why
    from continual.selection.steps import Taken
    from continual.selection.why import RoundVerdict
    from continual.service.once import Seen, Tried
    from continual.state.ledger import Waiting
    from continual.tuning import Tuned


_UNLIMITED = 1 << 30
_ESCAPED = re.compile(r"[^\n\x20-\x7e]")


def emit(value: object) -> None:
    """One JSON document on standard output. What a terminal would not show as a letter is written as an escape of
    JSON."""
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False)
    sys.stdout.write(_ESCAPED.sub(_escape, text) + "\n")


def _escape(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def say(text: str = "", *, lines: bool = False) -> None:
    """A line on standard output; with `lines` several, whose ends are ours."""
    sys.stdout.write(plain(text, _UNLIMITED, lines=lines) + "\n")


def warn(text: str) -> None:
    """A line on standard error; nothing where that is gone."""
    with contextlib.suppress(OSError):
        sys.stderr.write(plain(text, _UNLIMITED) + "\n")


def must_be_asked(destroys: str) -> None:
    """Raises Misconfigured where nobody can be asked whether what the command `destroys` is wanted."""
    from continual.errors import Misconfigured

    if sys.stdin is None or not sys.stdin.isatty():
        raise Misconfigured(f"{destroys}: say --yes where nobody can be asked; nothing was done")


def must_agree(question: str) -> None:
    """Goes on if the person at the terminal says yes; exits where not."""
    import typer

    if not typer.confirm(question, err=True):
        warn("Nothing was done.")
        raise typer.Exit(1)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns on standard output; the last column takes what room is left and is never cut."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        shown.add_column(name, overflow="fold", no_wrap=name != head[-1])
    for row in rows:
        shown.add_row(*("" if cell is None else plain(str(cell), _UNLIMITED) for cell in row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=400)
    with console.capture() as printed:
        console.print(shown)
    sys.stdout.write("".join(f"{line.rstrip(' ')}\n" for line in printed.get().splitlines()))


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Says that something of unknown length goes on, where the output is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def seen(found: Sequence[Seen]) -> None:
    """What would be taken, and what speaks against the rest."""
    table(
        ("model", "from", "commit", "taken", "why"),
        [(s.model, s.source, (s.revision or "")[:12], "yes" if s.take else "no", s.why) for s in found],
    )
    if not found:
        say("Nothing to see.")


def tried(found: Tried) -> None:
    """What became of a model that was taken: good news on standard output, a refusal or trouble on standard error."""
    if found.outcome is None:
        warn(str(found.trouble))
    else:
        outcome(found.outcome)


def tried_body(found: Tried) -> dict[str, object]:
    """The same for machines."""
    told: dict[str, object] = {"model": found.model, "trouble": found.trouble}
    return told if found.outcome is None else told | found.outcome.summary()


def outcome(found: Outcome) -> None:
    """What became of a model that was folded: on standard output, or on standard error where it is kept out."""
    if found.refused:
        warn(found.line())
    else:
        say(found.line())


def lora(found: LoraReport) -> None:
    """How near an adapter comes to the merge."""
    say(f"Wrote {found.directory}: rank {found.rank}, {found.adapted} weights adapted, {size(found.nbytes)}")
    say(f"relative error {found.error:.4g} over the whole task vector, {found.error_adapted:.4g} over what is adapted")
    if found.left_out:
        say(f"left out, as no adapter can have them: {few(found.left_out)}")
    cut(found.cut)


def cut(found: Sequence[CutModel]) -> None:
    """What a state of adapters has cut off of the models that are read; nothing where all of them are whole."""
    if found:
        told = few(f"{one.name} {one.cut:.2%}" for one in sorted(found, key=lambda one: -one.cut))
        say(f"cut off to make room in the state, of the square of a model's length: {told}")


def plans(found: Sequence[Plan]) -> None:
    """What folding each model would take, and what is special about it."""
    head = ("model", "form", "verdict", "matrices", "stacks", "plain", "unchanged", "read", "disk", "memory", "why")
    table(head, [_plan_row(p) for p in found])
    for p in found:
        if p.extra:
            say(f"{p.name}: stays out, as this state has no place for it: {', '.join(p.extra)}")
        if p.prefix != ("", ""):
            say(f"{p.name}: prefix {p.prefix[1]!r} stands for the base's {p.prefix[0]!r}")
        for said in p.tokens:
            say(f"{p.name}: rows matched by token{f'; {said}' if said else ''}")
        for ours, theirs in p.renamings:
            say(f"{p.name}: {theirs} stands for the base's {ours}")
        if p.narrowed:
            kinds = ", ".join(sorted(set(p.narrowed.values())))
            say(f"{p.name}: {len(p.narrowed)} tensors are {kinds}: the base is cast before subtracting")


def _plan_row(p: Plan) -> tuple[object, ...]:
    verdict = "fold" if p.ok else "known" if p.reason == "known" else f"refuse ({p.reason})"
    sizes = (size(p.read_bytes), size(p.disk_bytes), size(p.memory_bytes)) if p.ok else ("", "", "")
    return p.name, p.form, verdict, p.matrices, p.stacks, p.plain, p.unchanged, *sizes, p.message


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress callback that draws a bar on standard error where that is a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        from continual.executors.contract import silent

        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield report


def rules(found: Sequence[RuleInfo], transforms: Sequence[TransformInfo]) -> None:
    """The fold rules, the transforms that can stand before them, and which rules read each other's states."""
    table(("rule", "scale", "can", "what"), [(r.name, r.scale, _abilities(r), r.summary) for r in found])
    say("")
    say("scale: how the merge is read by default. can: w, models can have weights;")
    say("u, one is taken out by subtracting (else the later ones are folded again);")
    say("c, two states can be combined; a, it reads states of adapters, A as an adapter.")
    say("")
    table(("before", "what"), [(row.name, row.summary) for row in transforms])
    say("")
    for names in dict.fromkeys(row.readings for row in found if len(row.readings) > 1):
        say(f"A state of one of {', '.join(names)} is read by each of them.")
    for kind, what in (("adapters", "adapters"), ("tensors", "whole tensors")):
        able = ", ".join(row.name for row in found if kind in row.terms)
        say(f"Of {what} {able} take a coefficient for each model in each layer.")
    say("continual rules NAME says all of one: its options, what its state takes, its paper.")


def rule(found: RuleInfo | TransformInfo) -> None:
    """All of one rule or transform, a line each."""
    from continual.rules.catalogue import TransformInfo

    rows: list[tuple[str, object]] = [("what", found.summary), ("paper", found.paper)]
    if isinstance(found, TransformInfo):
        rows.append(("stands", "before a rule: init --before"))
    else:
        weights, unfold = _allowed(found)
        rows += [
            ("bytes per parameter", found.bytes_per_parameter),
            ("default scale", found.scale),
            ("order-free", "yes" if found.order_free else "no"),
            ("weights", weights),
            ("unfold", unfold),
            ("combine", "yes" if found.combine else "of adapters" if found.adapters else "no"),
            ("passes", f"{found.passes:.3g}"),
            ("needs", found.needs or "nothing"),
            ("read by", ", ".join(found.readings)),
            ("of adapters", found.adapters or "no"),
            ("models-layers", " and ".join(f"of {kind}" for kind in found.terms) or "no"),
        ]
    rows.append(("options", ", ".join(f"{key}={value}" for key, value in found.options.items()) or "none"))
    table((found.name, ""), rows)


def _allowed(found: RuleInfo) -> tuple[str, str]:
    """Whether models can have weights, and be taken out."""
    return "yes" if found.weighted else "no", "yes" if found.unfold else "refolds"


def _abilities(found: RuleInfo) -> str:
    """The same and more, a letter each."""
    adapters = {"factors": "A", "dense": "a"}.get(found.adapters, "")
    letters = (("w", found.weighted), ("u", found.unfold), ("c", found.combine))
    return "".join(letter for letter, able in letters if able) + adapters


def waiting_row(waiting: Waiting) -> tuple[object, ...]:
    """A candidate of the pool."""
    last = waiting.last
    said = last.message if last else "waits for its first round"
    return (
        waiting.candidate.name,
        when(waiting.since),
        waiting.rounds,
        figure(last.score if last else None),
        figure(last.z if last else None),
        said,
    )


def waiting_body(key: str, waiting: Waiting) -> dict[str, object]:
    """A candidate of the pool, for machines."""
    from continual.state.fields import body_of

    candidate = waiting.candidate
    return {
        "key": key,
        "since": waiting.since,
        "rounds": waiting.rounds,
        "name": candidate.name,
        "origin": candidate.origin,
        "form": candidate.form,
        "bytes": candidate.nbytes,
        "last": None if waiting.last is None else body_of(waiting.last),
    }


def why(found: Why) -> None:
    """What is known of a candidate, and what each round said of it."""
    reason = f" ({found.reason})" if found.reason else ""
    say(f"{found.name}: {found.fate}{reason}, first seen {when(found.since)} at {found.origin}")
    say(found.message)
    if found.rounds:
        head = ("record", "when", "members", "scored better", "score", "change", "error", "z", "weight", "said")
        table(head, [_round_row(row) for row in found.rounds])


def _round_row(judged: RoundVerdict) -> tuple[object, ...]:
    """What a round said of a candidate."""
    row = judged.row
    figures = [figure(value) for value in (row.score, row.change, row.error, row.z, row.weight)]
    said = row.fate + (f" ({row.reason})" if row.reason else "")
    return judged.record, when(judged.time), judged.members, judged.better, *figures, said


def caution(unsupervised: object) -> None:
    """What a user should know of rounds without labels."""
    from continual.selection import UNSUPERVISED

    if unsupervised:
        warn(UNSUPERVISED)


def heard(what: Outcome | Taken) -> None:
    """A fold or a step of a round, when it is made."""
    from continual.service.control.acting import told

    warn(told(what))


def trial(options: ReadOptions, score: float) -> None:
    """A candidate of a tuning and its score, when it is done."""
    warn(f"scale {options}: {score:.6g}")


def tuned_body(found: Tuned) -> dict[str, object]:
    """A tuning for machines."""
    return {
        "read": found.read.to_mapping(),
        "record": None if found.commit is None else found.commit.seq,
        "score": found.score,
        **found.entry.own(),
    }


def tuned(found: Tuned) -> None:
    """A tuning for people: its candidates, and which of them was chosen."""
    entry = found.entry
    chosen = (found.read.scale, found.read.lines or None)
    rows = []
    for row in entry.trials:
        marks = ["in force"] if row == entry.before else []
        if (row.scale, row.lines) == chosen:
            marks.append("chosen")
        lines = f"{row.lines[0]:g}:{row.lines[1]:g}" if row.lines else ""
        rows.append((row.scale, lines, f"{row.score:.6g}", ", ".join(marks)))
    table(("scale", "lines", "score", ""), rows)
    say(tuned_line(found))


def learned(found: Tuned) -> None:
    """The candidates by which coefficients were learned, and how far what must stay went under each."""
    drift = found.entry.drift
    rows = []
    for row in found.entry.trials:
        far = [] if row.drift is None else [f"{row.drift:.3g}", "too far" if drift and row.drift > drift else ""]
        rows.append((f"{row.loss:.6g}", f"{-row.score:.6g}", *far))
    heads = ("loss of the rows that drive", "of those that judge")
    table(heads if drift is None else (*heads, "drift of texts", ""), rows)


def within(found: Tuned) -> str:
    """How near the texts that must stay a candidate had to stay, where any must."""
    drift = found.entry.drift
    return "" if drift is None else f"within a drift of {drift:g} nats a token "


def tuned_line(found: Tuned, *, loss: bool = False) -> str:
    """What a tuning came to; `loss`: scores are minus the loss of the rows that judge."""
    entry = found.entry
    score, before = found.score, found.before
    worth = f"loss of the rows that judge {-score:.6g}, against {-before:.6g}" if loss else None
    far = ""
    if entry.drift is not None:
        drift = min(row.drift or 0.0 for row in entry.trials if row.score == score)
        far = f", and {drift:.3g} nats a token from what it predicted of texts, of {entry.drift:g} that may be"
    recorded = f"recorded as record {found.commit.seq}" if found.commit else "nothing recorded"
    return (
        f"scale {found.read}: {worth or f'{score:.6g}, against {before:.6g}'} at what was in force{far}; "
        f"{counted(len(entry.trials), 'candidate')} in {entry.seconds:.1f} s; {recorded}"
    )
