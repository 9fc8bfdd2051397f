"""The inputs that a rule reads a state of adapters by: of each model those of layers on rows of its task, as they were
read into the state (`continual tune --what inputs`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from continual.errors import Misconfigured
from continual.lazily import torch
from continual.outside import few
from continual.records import Candidate
from continual.rules import LayerInputs, Rule
from continual.state import State
from continual.state.format import FoldCommit
from continual.state.generation import Generation
from continual.state.task_inputs import SLOT, KeptInputs, generation, in_force, of_model, told

_READ = "'continual tune --what inputs --rows FILE --for {} --objective NAME', with rows of its task,"


class ModelsInputs:
    """The inputs of some models of a state, by the numbers of the models; each layer is read when it is asked for.
    Thread-safe."""

    def __init__(self, state: State, rule: Rule, folds: Collection[FoldCommit]) -> None:
        """Raises Misconfigured where nobody has read the inputs of one of these models."""
        self._path = state.path
        self._kept = of_folds(state, rule, folds)
        tasks = {kept.task.id: kept for kept in self._kept.values()}
        self._tasks: dict[str, tuple[KeptInputs, Generation]] = {
            key: (kept, generation(state.path, state.format, kept)) for key, kept in tasks.items()
        }

    @property
    def contents(self) -> dict[int, str]:
        """Which inputs each model has, by its number."""
        return {number: kept.task.id for number, kept in self._kept.items()}

    @property
    def rank(self) -> int:
        """How many vectors all tasks have of a layer, at most."""
        return sum(kept.entry.rank for kept, _ in self._tasks.values())

    def layer(self, name: str) -> Mapping[int, LayerInputs] | None:
        """Those of one layer, float32; None where a model has none there. Raises Damaged and Misconfigured."""
        found = {}
        for key, (kept, where) in self._tasks.items():
            with told(self._path, kept):
                if not where.has(name):
                    return None
                values = torch.from_numpy(where.read(name, SLOT))
            found[key] = LayerInputs(values[:-1], values[-1], name in kept.entry.across)
        if len({one.rows for one in found.values()}) > 1:
            return None  # read by objectives that run other classes
        return {number: found[kept.task.id] for number, kept in self._kept.items()}


def of_folds(state: State, rule: Rule, folds: Collection[FoldCommit]) -> dict[int, KeptInputs]:
    """The inputs of these models, by their numbers. Raises Misconfigured where nobody has read those of one."""
    kept, found, lacking = in_force(state.ledger), {}, []
    for fold in folds:
        mine = of_model(kept, fold.entry.candidate, fold.seq)
        if mine is None:
            lacking.append(fold.entry.candidate.name)
        else:
            found[fold.entry.numbers.block or 0] = mine
    if lacking:
        raise Misconfigured(
            f"{rule.name} reads by the inputs that layers have on rows of each model's task, and nobody has read those "
            f"of {few(lacking)}: {_READ.format(lacking[0])} reads them once"
        )
    return found


def check_inputs(state: State, rule: Rule, candidates: Collection[Candidate]) -> None:
    """Raises Misconfigured where `rule` is to read `state` with these candidates in the merge, and needs inputs of one
    that nobody has read: whoever exports, and the daemon, would find that nothing can be read."""
    if not rule.needs.inputs:
        return
    kept = in_force(state.ledger)
    for candidate in candidates:
        if of_model(kept, candidate) is None:
            raise Misconfigured(
                f"{candidate.name}: the merge is read by {rule.name}, which needs the inputs that layers have on rows "
                f"of each model's task: {_READ.format(candidate.name)} reads them; or have another rule read the merge "
                "('continual scale --rule')"
            )
