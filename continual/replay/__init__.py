"""Building a state again from its ledger and the models that it folded, and the proof that it is equal."""

from continual.replay.rebuilding import Replayed, rebuild
from continual.replay.replay_steps import ReplayPlan, plan_of

__all__ = ["ReplayPlan", "Replayed", "plan_of", "rebuild"]
