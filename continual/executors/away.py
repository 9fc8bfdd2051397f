"""What a worker of a cluster does with an order, and what it gives back: bytes, which the processes between it and
who sent the order pass on as they are."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from platform import python_version
from typing import NamedTuple

from continual.errors import ContinualError, Misconfigured, Refuse, Retry
from continual.executors.local import give_back_large_blocks
from continual.executors.orders import WorkOrder, work
from continual.lazily import torch


class WorkAnswer(NamedTuple):
    """What a worker gives back of an order: a result of each piece, or the error that ended it; where it runs, and the
    seconds that it took."""

    results: Sequence[object]
    error: Exception | None
    machine: str
    seconds: float


def answered(job: bytes, names: tuple[str, ...], versions: Mapping[str, str]) -> Iterator[tuple[str, str] | bytes]:
    """Does an order of a pickled `WorkJob`, on a worker. Says at once where it runs (the address of the machine, and
    the id of Ray's node there), and gives the `WorkAnswer` at the end, pickled."""
    machine, node = _here()
    yield machine, node
    yield _answer(job, names, versions, machine)


def _answer(job: bytes, names: tuple[str, ...], versions: Mapping[str, str], machine: str) -> bytes:
    began = time.perf_counter()
    torch.set_num_threads(1)
    give_back_large_blocks()
    results: Sequence[object] = ()
    raised: Exception | None = None
    try:
        _same_software(versions)
        results = work(WorkOrder(pickle.loads(job), names))
    except Exception as error:
        raised = _of_worker(error, machine)
    answer = WorkAnswer(results, raised, machine, time.perf_counter() - began)
    try:
        data = pickle.dumps(answer)
        if raised is not None:
            pickle.loads(data)
        return data
    except Exception as error:  # what others raise may hold a lock or a file, or not be made again of its words alone
        said = f"{type(raised or error).__name__}: {raised or error}"
        return pickle.dumps(answer._replace(results=(), error=_of_worker(RuntimeError(said), machine)))


def answer_of(data: bytes) -> WorkAnswer | str:
    """The answer that these bytes are; in words why it cannot be read: where the worker has software that this process
    has not, or in another version."""
    try:
        found = pickle.loads(data)
    except Exception as error:
        return f"its answer cannot be read here: {type(error).__name__}: {error}"
    return found if isinstance(found, WorkAnswer) else "its answer is none that is known here"


def software() -> dict[str, str]:
    """What has to be of the same version on every machine: it may give other bits where it is not."""
    return {"python": python_version(), **{name: version(name) for name in ("continual", "torch", "numpy")}}


def _of_worker(error: Exception, machine: str) -> Exception:
    """The error with the machine that it came from in its message. What is said of a candidate is the same wherever it
    is looked at. The trace of what nobody expected is a note, for who looks for a bug."""
    where = f"on the machine {machine}"
    if isinstance(error, Refuse):
        return error
    if isinstance(error, Misconfigured):  # of this machine: another may do it, and this one may be mended or go
        return Retry(f"{error} ({where}); nothing was settled")
    if isinstance(error, ContinualError):
        error.args = (f"{error} ({where})", *error.args[1:])
        return error
    found = error
    if isinstance(error, OSError) and error.strerror:
        found = OSError(error.errno, f"{error.strerror} ({where})", error.filename, None, error.filename2)
    elif isinstance(error, MemoryError):
        found = MemoryError(where)
    found.add_note(f"{where}:\n{''.join(traceback.format_tb(error.__traceback__))}")
    return found


def _here() -> tuple[str, str]:
    """The address of this machine in the cluster, and the id of Ray's node on it."""
    from ray import get_runtime_context, util

    address = util.get_node_ip_address()  # type: ignore[no-untyped-call, unused-ignore]
    return str(address), str(get_runtime_context().get_node_id())  # type: ignore[no-untyped-call, unused-ignore]


def _same_software(wanted: Mapping[str, str]) -> None:
    """Raises Misconfigured where this machine has other versions."""
    for name, here in software().items():
        if here != wanted[name]:
            raise Misconfigured(
                f"the worker has {name} {here}, and the driver has {wanted[name]}: install the same on every machine"
            )
