"""When a release that failed is tried again, as a table; and what is run aside."""

from __future__ import annotations

import asyncio

import pytest

from continual.errors import Misconfigured, Retry
from continual.hub import Trouble
from continual.retrying import PARKED, Fault
from continual.service.aside import aside
from continual.service.outlets import again_after

SOON, HOURLY = 5.0, PARKED


@pytest.mark.parametrize(
    ("error", "failures", "seconds"),
    [
        (Trouble("no answer", Fault.TRANSPORT), 1, SOON),
        (Trouble("503", Fault.SERVER), 3, 20.0),
        (Trouble("429", Fault.RATE, after=90.0), 1, 90.0),
        (Trouble("409", Fault.CONFLICT), 1, SOON),
        (Trouble("the token is refused", Fault.TOKEN), 1, HOURLY),
        (Trouble("the token may not write", Fault.DENIED), 1, HOURLY),
        (Trouble("no such request", Fault.REQUEST), 2, HOURLY),
        (Trouble("the token is refused", Fault.TOKEN, after=9000.0), 1, 9000.0),
        (Misconfigured("a model of somebody else is there"), 1, HOURLY),
        (Retry("the disk is full"), 2, 10.0),
        (OSError("the disk is gone"), 1, SOON),
        (ValueError("a bug"), 99, 300.0),
    ],
)
def test_what_only_a_person_can_mend_is_tried_once_an_hour(error: Exception, failures: int, seconds: float) -> None:
    assert again_after(error, failures) == seconds


def test_what_is_run_aside_comes_back_or_raises() -> None:
    def fails() -> int:
        raise Retry("not now")

    async def drive() -> None:
        assert await aside(lambda: 7) == 7
        with pytest.raises(Retry, match="not now"):
            await aside(fails)
        waits = asyncio.create_task(aside(lambda: 8))
        await asyncio.sleep(0)
        waits.cancel()  # what comes after that is dropped
        await asyncio.sleep(0.05)

    asyncio.run(drive())
