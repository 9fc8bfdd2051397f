"""A Ray cluster on this machine: a head and further nodes, each a process of `ray start --block` that ends with the
test. Ray listens on every interface of a machine, whatever address a node has, so this cluster takes only who knows a
token, drawn anew each time; it is without a dashboard and without statistics."""

from __future__ import annotations

import contextlib
import os
import secrets
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
UNTIL = 75.0
TRIES = 4


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


class RayNodes:
    """Nodes of one cluster; `address` is that of its head."""

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        # of this process too, which is the driver, and of those that it starts
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._environment.pop("HF_ENDPOINT", None)  # that of a test is that of the driver
        # Ray imports jsonschema, which imports this where it is there, and it takes seconds to make its grammar
        (directory / "without").mkdir()
        (directory / "without" / "rfc3987_syntax.py").write_text("raise ImportError\n")
        path = f"{directory / 'without'}{os.pathsep}{self._environment['PYTHONPATH']}"
        self._environment["PYTHONPATH"] = path
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def start(self, cpus: int = 1) -> None:
        """Starts the head, or a further node, and waits until it is up. On a busy machine an agent of Ray may take
        longer than the 15 seconds that it is given: then once more."""
        for left in reversed(range(TRIES)):
            if not self._nodes:
                self.address = f"127.0.0.2:{free_port()}"
            log = self._directory / f"{secrets.token_hex(4)}.log"
            with open(log, "wb") as output:
                node = subprocess.Popen(
                    self._command(cpus),
                    env=self._environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            began = time.monotonic()
            while node.poll() is None and time.monotonic() < began + UNTIL:
                if b"Ray runtime started." in log.read_bytes():
                    self._nodes.append(node)
                    return
                time.sleep(0.1)
            _end(node)
            if not left:
                raise RuntimeError(f"no Ray node here: {log.read_text()[-2000:]}")

    def _command(self, cpus: int) -> list[str]:
        head = ["--head", "--port", self.address.partition(":")[2], "--include-dashboard=false"]
        head += ["--no-monitor", "--temp-dir", tempfile.mkdtemp(dir=self._directory), "--disable-usage-stats"]
        # 127.0.0.1 is taken for the address of the network card
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--node-ip-address=127.0.0.{2 + len(self._nodes)}"]
        command += ["--address", self.address] if self._nodes else head
        command += [word for port in PORTS for word in (port, str(free_port()))]
        command += ["--num-cpus", str(cpus), "--num-gpus", "0", "--memory", str(MEMORY)]
        return [*command, "--object-store-memory", str(STORE), "--include-log-monitor", "false"]

    def kill_last(self) -> None:
        """Kills the node that was started last, with all its processes, as where its machine loses power."""
        node = self._nodes.pop()
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def stop(self) -> None:
        """Ends all nodes, the head last."""
        for node in reversed(self._nodes):
            _end(node)


def _end(node: subprocess.Popen[bytes]) -> None:
    """Ends a node with all its processes."""
    node.terminate()
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
