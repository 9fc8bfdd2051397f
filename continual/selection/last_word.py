"""The last word on the models that a round under relevance left out, by the merge that the rule makes of the chosen.

A search weighs models in a plain sum, with little of each. A weak fine-tune can look useless there, and the rule's
merge be better with it (ops/decisions/0058). So a model that serves a wanted task is folded on trial beside the chosen
ones, and all rows are asked, with it and without. It is kept if they are better with it by as much as a trial takes.
Nobody else is asked: who serves no task has no second chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from continual.engine.engine import Engine
from continual.engine.reading import Reading
from continual.engine.trying import Trials
from continual.executors.contract import Progress
from continual.selection.frank_wolfe import Chosen, SearchSpace
from continual.selection.judging import judge
from continual.selection.members import Member, opened_files
from continual.selection.round_options import RoundOptions
from continual.state import State
from continual.state.parts import MergedWord


def order(chosen: Chosen) -> list[str]:
    """The keys of the models that were chosen, in the order in which they are folded: the heaviest first."""
    weights = chosen.active.weights
    return sorted(weights, key=lambda key: (-weights[key][0], key))


def ask(
    space: SearchSpace,
    chosen: Chosen,
    options: RoundOptions,
    reading: Callable[[State], Reading],
    progress: Progress,
) -> dict[str, MergedWord]:
    """By key, what is found of each member that serves a task and was not chosen. They are asked in the order in which
    they came; who is kept is in the merge when the next is asked.

    Of N members and T tasks it costs N evaluations of the rows that drive, T + 1 of all rows at most, as many readings
    of the merged model, and T folds besides those of the chosen; nothing where nobody is left out. Raises Refuse where
    a member is gone, Retry, and Abandoned when told to stop.
    """
    members = {member.key: member for member in space.waiting if member.key not in chosen.lost}
    if len(members) == len(chosen.active.weights):
        return {}
    serves = {key: task for task, key in _servers(space, members, progress).items()}
    asked = {key: serves[key] for key in members if key in serves and key not in chosen.active.weights}
    found: dict[str, MergedWord] = {}
    if not asked:
        return found
    engine = space.model.engine
    with Trials(engine, progress) as trials:
        merged = engine
        for key in order(chosen):
            before, merged = merged, _folded(trials, merged, members[key]) or merged
            if merged is not before and before is not engine:
                trials.drop(before)
        _put(space, merged, reading, progress)
        calibration = space.model.calibration
        without = calibration.both()
        for key, task in asked.items():
            progress("last word", len(found), len(asked))
            tried = _folded(trials, merged, members[key])
            if tried is None:  # a gate keeps it out, and would when it is folded
                continue
            _put(space, tried, reading, progress)
            with_it = calibration.both()
            name, rows = Path(calibration.dealt[task].name).name, sum(map(len, without))
            found[key] = MergedWord(task, name, rows, *judge(without, with_it, task))
            if is_kept(found[key], options):
                merged, tried, without = tried, merged, with_it
            if tried is not engine:
                trials.drop(tried)
    return found


def is_kept(word: MergedWord, options: RoundOptions) -> bool:
    """Whether a member is chosen after all: all rows are better with it, as surely as a trial has to be."""
    return word.z < -options.settings.sigmas


def _servers(space: SearchSpace, members: Mapping[str, Member], progress: Progress) -> dict[int, str]:
    """By number of the task, the member that serves it: with which, alone and whole, the loss of the rows of that task
    that drive is least, and less than without any. Raises as `ask`."""
    model = space.model
    model.put(space.merged.vector, space.merged.need)
    best = model.calibration.driving()
    found: dict[int, str] = {}
    for done, (key, member) in enumerate(members.items()):
        model.engine.go_on("a round")
        progress("serves", done, len(members))
        model.move(member, 1.0)
        for task, loss in enumerate(model.calibration.driving()):
            if loss < best[task]:
                best[task], found[task] = loss, key
        model.move(member, -1.0)
    return found


def _folded(trials: Trials, on: Engine, member: Member) -> Engine | None:
    """As `Trials.fold`. Raises Refuse where the member is gone."""
    on.go_on("a round")
    with opened_files(on, member) as model:
        return trials.fold(on, model)


def _put(space: SearchSpace, at: Engine, reading: Callable[[State], Reading], progress: Progress) -> None:
    """Puts the model in memory at the merged model of a state."""
    merged = reading(at.state)
    merged.settle(at.executor, progress)
    space.model.put(merged.vector, merged.need)
