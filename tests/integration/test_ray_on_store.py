"""Folds on a Ray cluster into a state on an object store: the same bits as in one process on a disk, also where a
worker is killed in the middle; what is said where the workers have no keys of the store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from continual import api, making
from continual.config import Settings
from continual.errors import Retry
from continual.executors import links
from continual.executors.cluster_figures import FIGURES
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from continual.state import State
from continual.stores import Where
from tests.helpers import models, on_cluster
from tests.helpers.object_stores import environment, findings, has, serving, state_at

pytestmark = pytest.mark.slow
_NOBODY = "http://127.0.0.1:9"
OF_JOBS = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where `ray job submit --runtime-env-json` puts what the workers of a job have in their environment."""


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    on_cluster.address()  # or skip, before anything is started
    if not has("moto"):
        pytest.skip("moto is not installed")
    with serving("moto", tmp_path) as address:
        yield address


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the cluster, of which this test has a driver of its own."""
    monkeypatch.setattr(links, "_LINKS", {})
    yield on_cluster.address()
    for link in links._LINKS.values():
        link.close()


def _merge(state: Where, address: str) -> api.Merge:
    executor = OnRay(RayAsked(address, order=1 << 20), Local(1), threading.Event())

    class OnCluster(api.Merge):
        @property
        def executor(self) -> OnRay:
            return executor

    return OnCluster(Settings(state=state), write=True)


def _contents(state: Where) -> dict[str, bytes]:
    """The files of the generation in force."""
    with State.open(state) as found:
        generation = state / "generations" / str(found.ledger.head.generation)
        return {str(path).removeprefix(str(generation)): path.read_bytes() for path in _files(generation)}


def _files(directory: Where) -> Iterator[Where]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _kill_one(over: threading.Event) -> None:
    """Kills one worker that is doing an order of this process."""
    while not over.is_set():
        for directory in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                title, environment = (directory / "cmdline").read_bytes(), (directory / "environ").read_bytes()
                if title.startswith(b"ray::continual") and os.environ["RAY_AUTH_TOKEN"].encode() in environment:
                    os.kill(int(directory.name), signal.SIGKILL)
                    return
        time.sleep(0.002)


def test_the_same_bits_as_on_a_disk_also_where_a_worker_is_killed(
    tmp_path: Path, endpoint: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models.base(tmp_path / "base", shapes=models.big_shapes(0.005, layers=4))
    tunes = [models.fine_tune(base, tmp_path / f"tune-{number}", number) for number in range(2)]
    disk, store = tmp_path / "state", state_at(endpoint, "killed", monkeypatch)
    monkeypatch.setenv(OF_JOBS, json.dumps({"runtime_env": {"env_vars": dict(environment(endpoint))}}))
    for state in (disk, store):
        making.init(base, state, making.Recipe("tsv-m"))
    with api.Merge(Settings(state=disk, workers=1), write=True) as merge:
        assert [merge.fold(tune).fate for tune in tunes] == ["folded", "folded"]
    lost, over = FIGURES.seen().lost, threading.Event()
    killer = threading.Thread(target=_kill_one, args=(over,))
    with _merge(store, driver) as merge:
        assert merge.fold(tunes[0]).fate == "folded"
        killer.start()
        assert merge.fold(tunes[1]).fate == "folded"
    over.set()
    killer.join()
    assert FIGURES.seen().lost == lost + 1
    assert _contents(store) == _contents(disk)
    assert findings(store) == []


def test_workers_without_the_keys_of_the_store_say_so(
    tmp_path: Path, endpoint: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models.base(tmp_path / "base")
    store = state_at(endpoint, "keys", monkeypatch)
    making.init(base, store, making.Recipe("mean"))
    nobody = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_METADATA_ENDPOINT": _NOBODY}
    monkeypatch.setenv(OF_JOBS, json.dumps({"runtime_env": {"env_vars": nobody}}))
    with (
        _merge(store, driver) as merge,
        pytest.raises(Retry, match=r"there are no credentials for it in the environment .*on the machine 127"),
    ):
        merge.fold(models.fine_tune(base, tmp_path / "tune", 1))
    assert findings(store) == []
