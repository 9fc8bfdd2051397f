"""How much better the rule's merge has to be with a model that is asked."""

from __future__ import annotations

import pytest

from continual.selection.last_word import is_kept
from continual.state.parts import MergedWord
from tests.helpers.waiting import OPTIONS


@pytest.mark.parametrize(("task", "bar"), [(0, -3.0), (None, 0.0)])
def test_one_that_was_left_out_has_to_help_as_a_trial_does_and_a_chosen_one_to_be_missed(
    task: int | None, bar: float
) -> None:
    kept = [is_kept(MergedWord(100, -0.1, 0.1, z, task), OPTIONS) for z in (bar, bar - 1e-9)]
    assert kept == [False, True], "at the bar exactly it is out"
