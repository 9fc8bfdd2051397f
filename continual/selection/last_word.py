"""The last word on models that a round under relevance left out or let in, by the merge that the rule makes.

A search weighs models in a plain sum, with little of each. A weak fine-tune can look useless there, and the rule's
merge be better with it; another can look useful there, and hold the rule's merge down (ops/decisions/0058). So two
kinds of models are folded on trial, and all rows are asked, with each and without: one that was left out and serves a
wanted task is kept if they are better with it by as much as a trial takes; one that was chosen and serves none is
folded last, and stays if they miss it by as much as the search asks of those that stay. Who was left out and serves no
task has no second chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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


class LastWord(NamedTuple):
    """What the rule's merge has to say: the keys of the models to fold, in their `order`, and by key the `words` on
    those that were asked. One without a word, and not in the order, is out by other means."""

    order: Sequence[str]
    words: Mapping[str, MergedWord]


def ask(
    space: SearchSpace,
    chosen: Chosen,
    options: RoundOptions,
    reading: Callable[[State], Reading],
    progress: Progress,
) -> LastWord:
    """Asks the rule's merge. Folded first are the chosen that serve a task, the heaviest first. Then are asked those
    that serve one and were left out, in the order in which they came, then the chosen that serve none, the heaviest
    first. Who is kept is in the merge when the next is asked.

    Of N members it costs N + 1 evaluations of the rows that drive; where somebody is asked, a fold of each of the
    chosen and of the T at most that were left out, and one evaluation of all rows and one reading of the merged model
    more than are asked. Raises Refuse where a member is gone, Retry, and Abandoned when told to stop.
    """
    members = {member.key: member for member in space.waiting if member.key not in chosen.lost}
    weights = chosen.active.weights
    heaviest = sorted(weights, key=lambda key: (-weights[key][0], key))
    serves = {key: task for task, key in _servers(space, members, progress).items()} if members else {}
    order = [key for key in heaviest if key in serves]
    asked = [key for key in members if key in serves and key not in weights]
    asked += [key for key in heaviest if key not in serves]
    words: dict[str, MergedWord] = {}
    if not asked:
        return LastWord(order, words)
    engine = space.model.engine
    with Trials(engine, progress) as trials:
        merged = engine
        for key in order:
            before, merged = merged, _folded(trials, merged, members[key]) or merged
            if merged is not before and before is not engine:
                trials.drop(before)
        _put(space, merged, reading, progress)
        calibration = space.model.calibration
        without = calibration.both()
        for done, key in enumerate(asked):
            progress("last word", done, len(asked))
            tried = _folded(trials, merged, members[key])
            if tried is None:  # a gate keeps it out, and says so when it is folded
                order += [key] * (key in weights)
                continue
            _put(space, tried, reading, progress)
            with_it = calibration.both()
            task = serves.get(key)
            name = None if task is None else Path(calibration.dealt[task].name).name
            words[key] = MergedWord(sum(map(len, without)), *judge(without, with_it, task), task, name)
            if is_kept(words[key], options):
                order.append(key)
                merged, tried, without = tried, merged, with_it
            if tried is not engine:
                trials.drop(tried)
    return LastWord(order, words)


def is_kept(word: MergedWord, options: RoundOptions) -> bool:
    """Whether all rows are so much better with a member that it is folded."""
    return word.z < -(options.settings.stays if word.task is None else options.settings.sigmas)


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
