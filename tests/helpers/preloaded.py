"""Processes of `continual` that need not import torch first: a process that has imported what all commands need forks
one whenever it is asked to.

What runs is the command itself, in a process of its own with its own environment, working directory, descriptors and
signals. Importing takes some seconds of a core and the tests start the daemon about a hundred times.

The process that forks imports nothing that reads the environment on import but torch, whose settings the tests never
change, so a child may be given any environment.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): orphans below this process become its children, so it can wait for them."""
_MOST = 200_000
_SET: dict[int, socket.socket] = {}
"""The socket of the process that forks, by the process that asks it: a fork of the tests does not share it."""


class Process(subprocess.Popen[str]):
    """`continual ARGUMENTS`, as `Popen` has a process. What is None is as in this process."""

    def __init__(
        self,
        *arguments: object,
        stdout: int | None = None,
        stderr: int | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._asked = {
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if environment is None else environment),
            "cwd": str(Path.cwd() if cwd is None else cwd),
        }
        self._outputs = [1 if stdout is None else stdout, 2 if stderr is None else stderr]
        super().__init__(["continual", *self._asked["arguments"]], text=True)

    def _execute_child(self, *_: Any) -> None:
        """Stands in for fork and exec; the rest of `Popen` needs the process's number alone."""
        self.pid = _fork(self._asked, self._outputs)
        self._child_created = True


def _fork(asked: Mapping[str, object], outputs: Sequence[int]) -> int:
    ours = _SET.get(os.getpid()) or _SET.setdefault(os.getpid(), _start())
    body = json.dumps(asked).encode()
    assert len(body) < _MOST
    socket.send_fds(ours, [body], outputs)
    return int(ours.recv(32))


def _start() -> socket.socket:
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, its):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.helpers.preloaded", str(its.fileno())]
    process = subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, cwd=root)
    its.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(asking: socket.socket) -> list[str] | None:
    """Forks a process for each request. Returns its arguments in each of these processes, None when nobody asks any
    more."""
    while True:
        body, outputs, _, _ = socket.recv_fds(asking, _MOST, 2)
        if not body:
            return None
        told, tell = os.pipe()
        between = os.fork()  # its end makes the process an orphan, and so a child of the tests
        if between == 0:
            child = os.fork()
            if child != 0:
                os.write(tell, str(child).encode())
                os._exit(0)
            os.close(told)
            os.close(tell)
            asked = json.loads(body)
            asking.close()
            for number, descriptor in enumerate(outputs, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            # what these were before may have been files, which can be wound back
            sys.stdout = open(1, "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding=sys.stderr.encoding, closefd=False, buffering=1)  # noqa: SIM115
            os.environ.clear()
            os.environ.update(asked["environment"])
            os.chdir(asked["cwd"])
            return [str(argument) for argument in asked["arguments"]]
        os.waitpid(between, 0)
        asking.send(os.read(told, 32))
        for descriptor in (*outputs, told, tell):
            os.close(descriptor)


def main() -> None:
    """Imports what all commands need, and forks until nobody asks any more."""
    import torch  # noqa: F401 (commands load it when they first use it, which would be in each process)

    import continual.api
    import continual.cli.main
    import continual.service.daemon

    assert {"torch", "continual.api.merge"} <= sys.modules.keys(), "what is lazy is loaded anew in each process"
    assert "huggingface_hub" not in sys.modules, "it reads the environment when it is imported"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is not None:
        sys.argv = ["continual", *arguments]
        continual.cli.main.main()


if __name__ == "__main__":
    main()
