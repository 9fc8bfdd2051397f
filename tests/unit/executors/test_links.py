"""The driver of a cluster as a process of its own: what is said where there is no cluster, and where it goes away."""

from __future__ import annotations

import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from continual.errors import Abandoned, Misconfigured, Retry
from continual.executors import links
from continual.executors.links import link_to
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from tests.helpers import on_cluster
from tests.helpers.marking import MarkJob, tasks
from tests.helpers.services import until

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


NO_HEADS = ["local", "LOCAL", "127.0.0.1", ":6379", "head:", "head:0", "head:65536", "head:6379/", "a b:1", "[::1]"]


@pytest.mark.parametrize("address", ["", *NO_HEADS])
def test_an_address_of_no_head(address: str) -> None:
    """Of some of these Ray makes a cluster of its own, which listens on every interface."""
    with pytest.raises(Misconfigured, match=f"ray.address = '{re.escape(address)}': write HOST:PORT of the head"):
        on_ray(address)


@pytest.mark.parametrize("address", NO_HEADS)
def test_an_address_of_no_head_in_the_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Misconfigured, match=f"RAY_ADDRESS, in the environment, = '{re.escape(address)}': write"):
        _ = on_ray("auto").workers


@pytest.mark.parametrize("address", ["[::1]:1", "a..b:1", "ä" * 80 + ":1"])
def test_an_address_that_leads_nowhere(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(Retry, match="nobody listens there"):
        _ = on_ray(address).workers


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


SAID_TO_BE_UP = """
import os, sys, time
from multiprocessing.connection import Connection
from continual.executors.driving import Nodes, RayLoaded
link = Connection(int(sys.argv[1]))
link.send(RayLoaded())
has = {"CPU": 1.0, "memory": 1e9}
link.send(Nodes([{"NodeID": "ab", "NodeManagerAddress": "127.0.0.1", "Alive": True, "Resources": has}]))
"""
"""A driver whose cluster has one machine."""


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], OnRay]]:
    """An executor whose drivers connect, and do what a script says then; what it is given says to stop."""
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def made(script: str, stopping: threading.Event | None = None) -> OnRay:
            monkeypatch.setattr(links, "_CODE", SAID_TO_BE_UP + script)
            return on_ray(f"127.0.0.1:{listening.getsockname()[1]}", stopping)

        yield made


def test_a_driver_that_does_not_listen_keeps_nobody_from_stopping(
    drivers: Callable[..., OnRay], job: MarkJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was stopped, or has no memory: a job of many tensors fills the socket."""
    monkeypatch.setattr(links, "SILENT", 0.1)
    stopping = threading.Event()
    executor = drivers("time.sleep(60)", stopping)
    large = replace(job, directory=Path("/" + "x" * (8 << 20)))
    threading.Timer(1.0, stopping.set).start()
    began = time.monotonic()
    with pytest.raises(Abandoned, match="stopping"):
        list(executor.map(tasks(large, ["plain-0"])))
    assert time.monotonic() < began + 20.0


def test_an_answer_that_cannot_be_read_ends_the_driver(drivers: Callable[..., OnRay], job: MarkJob) -> None:
    executor = drivers("link.recv(); link.recv(); link.send_bytes(b'no message'); time.sleep(60)")
    with pytest.raises(Retry, match=r"went away in the middle .*\(what its driver says cannot be read: Unpick"):
        list(executor.map(tasks(job, ["plain-0"])))


def test_a_driver_of_a_cluster_that_the_settings_name_no_more_ends_once_it_has_nothing_to_do(
    drivers: Callable[..., OnRay],
) -> None:
    executor = drivers("while True: link.recv()")
    assert executor.workers == 1
    address = executor._asked.address
    link = link_to(address, lambda: None)
    try:
        with link.used(), link.used():
            links.only("10.0.0.9:6379")
            assert link.is_up
        assert not link.is_up
        assert link._driver.poll() is not None
        link = link_to(address, lambda: None)  # a fold under way goes on with the settings that it began with
        with link.used():
            assert link.is_up
        assert not link.is_up
        link = link_to(address, lambda: None)
        with link.used():
            links.only(address)
        assert link.is_up, "the settings name it again"
        links.only(None)
        assert not link.is_up
    finally:
        links.only(address)


def of_clusters() -> list[str]:
    """The threads that drivers have here."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cluster-")]


@pytest.mark.parametrize("after", ["", "link.recv()", "link.recv(); link.recv()", "os.write(link.fileno(), b'abc')"])
def test_a_driver_that_ends_leaves_nothing_open(drivers: Callable[..., OnRay], job: MarkJob, after: str) -> None:
    """As soon as it is connected, or once it has its job, or its order, or in the middle of an answer."""
    until(lambda: not of_clusters(), "the threads of its driver end")
    open_files = os.listdir("/proc/self/fd")
    with pytest.raises(Retry, match="went away in the middle of the work"):
        list(drivers(after).map(tasks(job, ["plain-0"])))
    until(lambda: not of_clusters(), "the threads of its driver end")
    assert os.listdir("/proc/self/fd") == open_files


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


def test_a_signal_to_all_processes_of_a_service_ends_no_driver_that_still_loads_ray() -> None:
    """Else what drains would be told that there is no cluster."""
    pytest.importorskip("ray")
    mine, others = socket.socketpair()
    with mine, others:
        fd = others.fileno()
        driver = subprocess.Popen([sys.executable, "-c", links._CODE, str(fd), "127.0.0.1:1"], pass_fds=[fd])
        others.close()
        try:
            until(lambda: select.select([mine], [], [], 0)[0] or ignores(driver.pid, signal.SIGTERM), "it ignores it")
            assert not select.select([mine], [], [], 0)[0], "it said that Ray is loaded"
        finally:
            driver.kill()
            driver.wait()


def test_a_driver_that_cannot_read_what_to_do_ends() -> None:
    """It would not see any more that who has the work is gone."""
    pytest.importorskip("ray")
    mine, others = socket.socketpair()
    with mine, others:
        fd = others.fileno()
        command = [sys.executable, "-c", links._CODE, str(fd), "127.0.0.1:1"]
        driver = subprocess.Popen(command, pass_fds=[fd], stderr=subprocess.PIPE)
        mine.sendall(b"\0\0\0\2no")
        _, said = driver.communicate(timeout=60)
        assert b"what is to be done cannot be read: UnpicklingError" in said


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether a process ignores a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:"))
    return bool(mask >> (number - 1) & 1)


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
