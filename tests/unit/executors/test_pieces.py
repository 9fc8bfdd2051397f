"""What every executor keeps to with pieces of a job, in whichever process they are done: here, through bytes, on a Ray
cluster. Tasks that are no pieces are in `test_contract`."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from continual.errors import Abandoned, Misconfigured, Refuse
from continual.executors.cluster_figures import FIGURES
from continual.executors.contract import Executor, Task
from continual.executors.local import Local
from continual.executors.orders import WorkPiece, at_hand, groups, order_of
from continual.executors.ray import OnRay, RayAsked
from tests.helpers import on_cluster
from tests.helpers.marking import Mark, MarkJob, tasks
from tests.helpers.posted import Posted

MANY = 1 << 40
Make = Callable[[int], Executor]


EXECUTORS: dict[str, Make] = {
    "local": lambda workers: Local(workers, MANY),
    "posted": lambda _: Posted(),
    "ray": on_cluster.executor,
}


@pytest.fixture(params=EXECUTORS)
def make(request: pytest.FixtureRequest) -> Make:
    return EXECUTORS[request.param]


@pytest.fixture
def job(tmp_path: Path) -> MarkJob:
    return MarkJob(secrets.token_hex(8), tmp_path)


def test_each_result_has_its_name_and_torch_one_thread(make: Make, job: MarkJob) -> None:
    names = [f"plain-{n}" for n in range(7)]
    found = dict(make(2).map(tasks(job, names)))
    assert {name: mark.name for name, mark in found.items()} == {name: name for name in names}
    assert {mark.threads for mark in found.values()} == {1}


def test_an_error_comes_as_it_was_raised_and_nothing_runs_any_more(make: Make, job: MarkJob, tmp_path: Path) -> None:
    names = ["broken-0", *(f"plain-{n}" for n in range(60))]
    with pytest.raises(Refuse, match="broken-0 cannot be done") as caught:
        list(make(2).map(tasks(job, names)))
    assert (caught.value.reason, caught.value.by) == ("zero", ("x",))
    begun = len(list(tmp_path.glob("begun-*")))
    assert begun < 50
    assert len(list(tmp_path.glob("begun-*"))) == begun


def test_as_many_at_a_time_as_there_are_workers(make: Make, job: MarkJob, tmp_path: Path) -> None:
    executor = make(3)
    (tmp_path / "wanted").write_text(str(executor.workers))
    names = [f"together-{n}" for n in range(executor.workers)]
    assert sorted(name for name, _ in executor.map(tasks(job, names))) == names


def test_a_result_is_there_as_soon_as_its_order_has_ended(make: Make, job: MarkJob, tmp_path: Path) -> None:
    results = make(2).map(tasks(job, ["plain-0", "after-go"]))
    assert next(results)[0] == "plain-0"
    (tmp_path / "go").touch()
    assert [name for name, _ in results] == ["after-go"]


def test_nothing_to_do_and_used_again(make: Make, job: MarkJob) -> None:
    executor = make(2)
    assert list(executor.map([])) == []
    for number in range(2):
        assert [name for name, _ in executor.map(tasks(job, [f"plain-{number}"]))] == [f"plain-{number}"]


def test_what_is_no_piece_is_done_here(make: Make) -> None:
    here = threading.get_ident()
    assert dict(make(2).map([Task("closure", 1, lambda: here)])) == {"closure": here}


def test_what_is_open_already_is_not_opened_again(job: MarkJob, tmp_path: Path) -> None:
    with at_hand(job, job.open()):
        list(Local(2, MANY).map(tasks(job, [f"plain-{n}" for n in range(4)])))
    assert len(list(tmp_path.glob("opened-*"))) == 1


def test_orders_take_pieces_of_one_job_up_to_so_many_bytes_or_a_whole(job: MarkJob, tmp_path: Path) -> None:
    other = MarkJob("other", tmp_path)
    pieces = [Task(f"a{n}", 1, WorkPiece(job, f"a{n}"), reads=100) for n in range(5)]
    pieces += [Task("b", 1, WorkPiece(other, "b"), reads=1000), Task("c", 1, WorkPiece(other, "c"))]
    pieces += [Task(f"w{n}", 1, WorkPiece(other, f"w{n}", "file"), reads=1000) for n in range(3)]
    found = [order for group in groups(pieces, 250) if (order := order_of(group)) is not None]
    assert [order.names for order in found] == [("a0", "a1"), ("a2", "a3"), ("a4",), ("b",), ("c",), ("w0", "w1", "w2")]
    small = [Task(f"s{n}", 1, WorkPiece(job, f"s{n}")) for n in range(2500)]
    assert [len(group) for group in groups(small, 250)] == [1000, 1000, 500]
    closures: list[Task[Mark]] = [Task("d", 1, lambda: Mark("d", 1)), *pieces[:1]]
    assert [order_of(group) is None for group in groups(closures, 250)] == [True, False]


def test_a_stop_ends_orders_at_once(job: MarkJob, tmp_path: Path) -> None:
    stopping = threading.Event()
    executor = OnRay(RayAsked(on_cluster.address(), workers=2), Local(1, MANY), stopping)
    results = executor.map(tasks(job, ["plain-0", "after-never"]))
    assert next(results)[0] == "plain-0"
    stopping.set()
    with pytest.raises(Abandoned, match="stopping"):
        next(results)
    assert not (tmp_path / "ended-after-never").exists()


def test_what_a_cluster_did_is_known_while_it_does_it_and_after(
    job: MarkJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor, before = on_cluster.executor(2), FIGURES.seen()
    caplog.set_level(logging.INFO, "continual.executors")
    results = executor.map(tasks(job, ["plain-0", "after-go", "plain-1"]))
    assert next(results)[0] == "plain-0"
    seen = FIGURES.seen(on_cluster.address())
    assert (seen.done, seen.total, [order.first for order in seen.out]) == (1, 3, ["after-go"])
    assert {name: (node.alive, node.cores) for name, node in seen.nodes.items()} == {
        "127.0.0.2": (True, 2.0),
        "127.0.0.3": (True, 2.0),
    }
    assert seen.answered is not None
    (tmp_path / "go").touch()
    assert len(list(results)) == 2
    after = FIGURES.seen(on_cluster.address())
    assert (after.total, after.out, after.all.orders - before.all.orders) == (0, (), 3)
    assert after.all.nbytes - before.all.nbytes == 3 << 40
    assert after.work.keys() <= after.nodes.keys(), "a machine has one address"
    assert "3 orders done on the cluster: 127.0.0." in caplog.text


def head_of(address: str) -> int:
    """The process of a cluster that knows its machines."""
    port = f"--gcs_server_port={address.partition(':')[2]}".encode()
    for one in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if one.name.isdecimal() and port in (one / "cmdline").read_bytes().split(b"\0"):
                return int(one.name)
    raise AssertionError(f"no head listens at {address}")


def test_orders_go_on_while_the_head_of_the_cluster_is_silent(job: MarkJob, tmp_path: Path) -> None:
    """On workers that it has: it is asked for new ones."""
    executor = on_cluster.executor(4)
    (tmp_path / "wanted").write_text("4")
    list(executor.map(tasks(job, [f"together-{n}" for n in range(4)])))
    results = executor.map(tasks(job, [f"plain-{n}" for n in range(8)]))
    next(results)
    head = head_of(on_cluster.address())
    os.kill(head, signal.SIGSTOP)
    began = time.monotonic()
    again = threading.Timer(20.0, os.kill, (head, signal.SIGCONT))
    again.start()
    try:
        assert len(list(results)) == 7
        assert time.monotonic() < began + 15.0
    finally:
        again.cancel()
        os.kill(head, signal.SIGCONT)


ON_A_THREAD = """
import os, signal, sys, threading
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
executor = OnRay(RayAsked(sys.argv[1]), Local(1), threading.Event())
thread = threading.Thread(target=lambda: executor.workers)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
print(heard, signal.getitimer(signal.ITIMER_REAL))
"""


def test_who_has_work_for_a_cluster_has_its_signals_for_itself() -> None:
    """Ray's handler sets an alarm, which aborts a process after three seconds: a daemon could not drain."""
    command = [sys.executable, "-c", ON_A_THREAD, on_cluster.address()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['SIGTERM'] (0.0, 0.0)\n"


def test_a_ray_client_is_refused_by_its_address() -> None:
    with pytest.raises(Misconfigured, match="not as a Ray Client"):
        OnRay(RayAsked("ray://127.0.0.1:10001"), Local(1, MANY), threading.Event())
