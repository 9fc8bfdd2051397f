"""The driver of a cluster as a process of its own: what is said where there is no cluster, and where it goes away."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from pathlib import Path

import pytest

from continual.errors import Abandoned, Misconfigured, Retry
from continual.executors import links
from continual.executors.links import link_to
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from tests.helpers import on_cluster
from tests.helpers.marking import MarkJob, tasks

MANY = 1 << 40


def on_ray(address: str, stopping: threading.Event | None = None) -> OnRay:
    return OnRay(RayAsked(address), Local(1, MANY), stopping or threading.Event())


@pytest.fixture
def job(tmp_path: Path) -> MarkJob:
    return MarkJob(secrets.token_hex(8), tmp_path)


def test_an_address_where_nobody_listens_is_said_at_once() -> None:
    pytest.importorskip("ray")
    with pytest.raises(Retry, match=r"127.0.0.1:1: nobody listens there .*start one with 'ray start --head'"):
        _ = on_ray("127.0.0.1:1").workers


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_the_address_of_something_else_in_the_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Misconfigured, match=f"RAY_ADDRESS = {address}, in the environment: that is for 'ray job"):
        _ = on_ray("auto").workers


def test_who_listens_and_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself waits for more than five minutes."""
    pytest.importorskip("ray")
    monkeypatch.setattr(links, "CONNECTED", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Retry, match=f"{address}: no Ray cluster answers there .*is its head still up"):
            _ = on_ray(address).workers


def test_a_stop_while_it_connects() -> None:
    pytest.importorskip("ray")
    stopping = threading.Event()
    stopping.set()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Abandoned, match="stopping"):
        _ = on_ray(f"127.0.0.1:{silent.getsockname()[1]}", stopping).workers


def test_another_token_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    address = on_cluster.address()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(Retry, match="has another token: it wants RAY_AUTH_MODE=token and the same token"):
        _ = on_ray(address.replace("127.0.0.2", "127.0.0.1")).workers


def test_a_driver_that_ray_ends_costs_the_work_and_not_this_process(job: MarkJob, tmp_path: Path) -> None:
    """So it goes when the head is gone for a minute; the next work has a driver of its own."""
    address = on_cluster.address()
    results = on_ray(address).map(tasks(job, ["plain-0", "after-go"]))
    assert next(results)[0] == "plain-0"
    before = link_to(address, lambda: None)
    os.kill(before._driver.pid, signal.SIGKILL)
    with pytest.raises(Retry, match=r"went away in the middle of the work .*nothing was settled"):
        next(results)
    (tmp_path / "go").touch()
    assert [name for name, _ in on_ray(address).map(tasks(job, ["plain-1"]))] == ["plain-1"]
    assert link_to(address, lambda: None) is not before


def test_a_signal_to_all_processes_of_a_service_ends_no_driver(job: MarkJob, tmp_path: Path) -> None:
    """What has the work drains, and the orders that are out come back to it."""
    address = on_cluster.address()
    results = on_ray(address).map(tasks(job, ["plain-0", "after-go"]))
    assert next(results)[0] == "plain-0"
    os.kill(link_to(address, lambda: None)._driver.pid, signal.SIGTERM)
    (tmp_path / "go").touch()
    assert [name for name, _ in results] == ["after-go"]


def test_work_of_two_threads_is_kept_apart(job: MarkJob, tmp_path: Path) -> None:
    executor = on_ray(on_cluster.address())
    first, second = executor.map(tasks(job, ["plain-0", "after-go"])), executor.map(tasks(job, ["plain-1", "plain-2"]))
    assert next(first)[0] == "plain-0"
    assert sorted(name for name, _ in second) == ["plain-1", "plain-2"]
    (tmp_path / "go").touch()
    assert [name for name, _ in first] == ["after-go"]


def test_a_silent_cluster_is_not_waited_for_at_a_stop(job: MarkJob, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = threading.Event()
    address = on_cluster.address()
    results = on_ray(address, stopping).map(tasks(job, ["plain-0", "after-never"]))
    assert next(results)[0] == "plain-0"
    link = link_to(address, lambda: None)
    monkeypatch.setattr(links, "SILENT", -1.0)
    stopping.set()
    with pytest.raises(Abandoned, match="stopping"):
        next(results)
    assert not link.is_up
