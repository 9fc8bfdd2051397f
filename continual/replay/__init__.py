"""Building a state again from its ledger and the models that it folded, and the proof that it is equal."""

from continual.replay.rebuilding import Replayed, rebuild
from continual.replay.replay_parts import ReplayTree, tree_of
from continual.replay.replay_steps import ReplayPlan

__all__ = ["ReplayPlan", "ReplayTree", "Replayed", "rebuild", "tree_of"]
