"""A Ray cluster on this machine: a head and further nodes, each a process of `ray start --block` that ends with the
test. Everything listens on loopback, without a dashboard and without statistics."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_MEMORY_MONITOR": "1",  # others take memory of this machine
    "RAY_DEDUP_LOGS": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
}
PORTS = (
    "--node-manager-port",
    "--object-manager-port",
    "--runtime-env-agent-port",
    "--dashboard-agent-grpc-port",
    "--dashboard-agent-listen-port",
    "--metrics-export-port",
)
STORE = 100_000_000
"""Bytes of the object store of a node: jobs and receipts."""
MEMORY = 3 << 30
UNTIL = 150.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


class RayNodes:
    """Nodes of one cluster; `address` is that of its head."""

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"127.0.0.2:{free_port()}"

    def start(self, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Starts the head, or a further node, and waits until it is up."""
        head = ["--head", "--port", self.address.partition(":")[2], "--include-dashboard=false"]
        head += ["--no-monitor", "--temp-dir", str(self._directory), "--disable-usage-stats"]
        # 127.0.0.1 is taken for the address of the network card
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--node-ip-address=127.0.0.{2 + len(self._nodes)}"]
        command += ["--address", self.address] if self._nodes else head
        command += [word for port in PORTS for word in (port, str(free_port()))]
        command += ["--num-cpus", str(cpus), "--num-gpus", "0", "--memory", str(MEMORY)]
        command += ["--object-store-memory", str(STORE), "--include-log-monitor", "false"]
        log = self._directory / f"node-{len(self._nodes)}.log"
        with open(log, "wb") as output:
            node = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )
        self._nodes.append(node)
        began = time.monotonic()
        while b"Ray runtime started." not in log.read_bytes():
            if node.poll() is not None or time.monotonic() > began + UNTIL:
                raise RuntimeError(f"no Ray node here: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        return node

    def stop(self) -> None:
        """Ends all nodes, the head last."""
        for node in reversed(self._nodes):
            node.terminate()
        for node in reversed(self._nodes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@contextlib.contextmanager
def cluster(*cpus: int) -> Iterator[RayNodes]:
    """A cluster whose nodes have so many cores each."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        nodes = RayNodes(Path(directory))
        try:
            for each in cpus:
                nodes.start(each)
            yield nodes
        finally:
            nodes.stop()
