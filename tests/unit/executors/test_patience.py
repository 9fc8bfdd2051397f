"""What is said while no order comes back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

from continual.errors import Retry
from continual.executors.patience import NO_ROOM, Patience

OPTIONS = {"num_cpus": 1, "num_gpus": 0.0, "memory": 2_000_000_000, "name": "continual lm_head.weight"}


class Link(NamedTuple):
    """A cluster with these machines that was silent for so long."""

    nodes: list[Mapping[str, Any]]
    silent: float = 0.0
    address: str = "10.0.0.1:6379"


def machine(cores: float, memory: float, gpus: float = 0.0) -> Mapping[str, Any]:
    return {"Resources": {"CPU": cores, "memory": memory, "GPU": gpus}}


def said(link: Link, until: float, caplog: pytest.LogCaptureFixture, **asked: object) -> list[tuple[float, str]]:
    """What the log says in so many seconds, looked at each half second, and when."""
    now = [0.0]
    patience, found = Patience(lambda: now[0]), []
    with caplog.at_level(logging.INFO, "continual.executors"):
        while now[0] < until:
            now[0] += 0.5
            caplog.clear()
            patience.look(link, 3, {**OPTIONS, **asked})  # type: ignore[arg-type]
            found += [(now[0], record.getMessage()) for record in caplog.records]
    return found


def test_orders_that_are_out_are_told_of_more_and_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    told = said(Link([machine(2, 4e9), machine(2, 4e9)]), 170, caplog)
    assert [when for when, _ in told] == [20.0, 40.0, 80.0, 160.0]
    assert told[0][1] == (
        "3 orders out, none came back for 20 s: 2 machines alive; others may have their cores. "
        "A process 'ray::continual lm_head.weight' that hangs can be killed"
    )


def test_where_no_worker_begins_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    patience = Patience(lambda: now[0])
    now[0] = 21.0
    patience.look(Link([machine(2, 4e9)]), 1, OPTIONS, begun=False)  # type: ignore[arg-type]
    assert caplog.messages == [
        "1 order out, none came back for 21 s, and no worker began with one: 1 machine alive; others have their cores, "
        "or their workers do not start: the logs of Ray on them (/tmp/ray/session_latest/logs) say why"
    ]


def test_a_silent_cluster_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    told = said(Link([machine(2, 4e9)], silent=33.0), 21, caplog)
    assert [text for _, text in told] == [
        "3 orders out, none came back for 20 s: the cluster at 10.0.0.1:6379 has not answered for 33 s"
    ]


@pytest.mark.parametrize(
    ("machines", "asked", "lacks"),
    [
        ([machine(2, 4e9)], {"num_gpus": 1.0}, r"1 core, 1 GPU and 2.00 GB of memory\): it has 1 machine with 2 cores"),
        ([machine(2, 1e9), machine(2, 1e9)], {}, r"1 core and 2.00 GB of memory\): it has 2 machines with 4 cores"),
        ([machine(0, 4e9)], {}, r"it has 1 machine with 0 cores and 0 GPUs in all"),
        ([], {}, r"it has 0 machines"),
    ],
)
def test_where_no_machine_can_do_it_that_is_said_soon_and_given_up_in_the_end(
    machines: list[Mapping[str, Any]], asked: dict[str, object], lacks: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = said(Link(machines), 19, caplog, **asked)
    assert [when for when, _ in told] == [5.0]
    assert "look at ray.gpus and ray.memory, or let a machine join" in told[0][1]
    with pytest.raises(Retry, match=lacks):
        said(Link(machines), NO_ROOM + 1, caplog, **asked)
    assert said(Link([*machines, machine(1, 8e9, 4.0)]), 19, caplog, **asked) == []


def test_what_comes_begins_it_anew(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    patience = Patience(lambda: now[0])
    with caplog.at_level(logging.INFO, "continual.executors"):
        for now[0] in (15.0, 30.0):
            patience.renew()
            patience.look(Link([machine(2, 4e9)]), 1, OPTIONS)  # type: ignore[arg-type]
    assert caplog.records == []
