"""The one Ray cluster that tests of a session share. It is started where the variable CONTINUAL_RAY is set: two nodes
take half a minute to start, more on a busy machine."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import threading

import pytest

from continual.executors.local import Local
from continual.executors.ray import ORDER, OnRay, RayAsked
from tests.helpers.clusters import cluster

WANTED = "CONTINUAL_RAY"


@functools.cache
def address() -> str:
    """The address of the cluster. Skips the test where there is to be none."""
    if not os.environ.get(WANTED):
        pytest.skip(f"needs a Ray cluster of its own, which takes long to start: set {WANTED}=1")
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs the package ray: pip install 'continual[ray]'")
    running = cluster(2, 2)
    nodes = running.__enter__()
    atexit.register(running.__exit__, None, None, None)
    return nodes.address


def executor(workers: int, order: int = ORDER) -> OnRay:
    """An executor on the cluster, whose orders read so many bytes."""
    return OnRay(RayAsked(address(), workers=workers, order=order), Local(workers, 1 << 40), threading.Event())
