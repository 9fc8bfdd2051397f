"""Commands of continual in processes of their own, as the benchmarks run them: what each took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

MEASURE = """
import json, sys, time
def told(began, clock):
    wall = time.perf_counter() - clock
    with open("/proc/self/status") as lines:
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps([time.process_time() - began, time.process_time(), wall, peak]), file=sys.stderr)
"""
"""`told` is called last, with the CPU seconds and the clock as they were when imports were done: CPU seconds since then
and of the whole process, seconds since then, and VmHWM in bytes, which the kernel's `ru_maxrss` is not: that counts the
memory of the process that started this one."""
_COMMAND = (
    MEASURE
    + """
import blake3, google_crc32c, torch, zarr
import continual.api, continual.cli.main, continual.gates, continual.making, continual.publish.lora
began = time.process_time(), time.perf_counter()
try:
    continual.cli.main.main()
finally:
    told(*began)
"""
)


class Cost(NamedTuple):
    """What a command took: CPU seconds beyond importing and in all, seconds beyond importing, and VmHWM in bytes."""

    cpu: float
    whole: float
    wall: float
    memory: int


def python(code: str, *words: str, by: str = sys.executable, env: Mapping[str, str] | None = None) -> Cost:
    """Runs `code`, which begins with MEASURE and ends with `told`, to its end in one thread of torch and BLAS. Raises
    AssertionError with what it said where it failed."""
    environment = {**os.environ, **THREADS, **(env or {})}
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run([by, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=said, env=environment)
        said.seek(0)
        lines = said.read().splitlines()
    assert done.returncode == 0, (words, lines)
    return Cost(*json.loads(lines[-1]))


def continual(*words: str, env: Mapping[str, str] | None = None) -> Cost:
    """Runs `continual` with these words."""
    return python(_COMMAND, *words, env=env)
