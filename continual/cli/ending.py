"""How a command ends: each thing that can go wrong as one line on standard error and an exit code. No command ends with
a traceback, whatever the environment does; `--debug` shows it. Also the standard streams as they are at the beginning
and at the end."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tempfile
import traceback
from typing import NamedTuple

from continual.errors import Busy, ContinualError, Misconfigured, Refuse, Retry

DONE, KEPT_OUT, USAGE, ENVIRONMENT, DAMAGE, BUSY, BUG, INTERRUPTED, CLOSED = 0, 1, 2, 3, 4, 5, 70, 130, 141
TEXT = (
    "Exit codes: 0 done; 1 a model was refused, or you said no; 2 wrong usage or settings; "
    "3 the environment got in the way, try again;\n"
    "4 the state or base is damaged or going on would be wrong; 5 another process is writing to the state;\n"
    "70 a bug of continual; 130 interrupted; 141 nobody reads the output any more."
)
_CODES = ((Busy, BUSY), (Misconfigured, USAGE), (Refuse, KEPT_OUT), (Retry, ENVIRONMENT), (ContinualError, DAMAGE))
_WRONG_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT, errno.EINVAL)
"""What is wrong with a path itself: it is no use to try again."""


class Ending(NamedTuple):
    """An exit code, and the line that says why; no line where there is nothing to say or nobody to hear it."""

    code: int
    line: str | None = None


def of(error: BaseException) -> Ending:
    """How a command ends in which `error` was raised. A bug of ours has its trace written to a file."""
    if isinstance(error, ContinualError):
        return Ending(next(code for kind, code in _CODES if isinstance(error, kind)), str(error))
    if isinstance(error, BrokenPipeError):
        return Ending(CLOSED)
    if isinstance(error, KeyboardInterrupt):
        return Ending(INTERRUPTED, "interrupted")
    if isinstance(error, MemoryError):
        return Ending(ENVIRONMENT, f"out of memory{_more(error)}: give it more, or set memory and workers lower")
    if isinstance(error, UnicodeError):
        return Ending(USAGE, f"a name that cannot be written as text: {error}")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of pathlib, before Python 3.13
        return Ending(USAGE, str(error))
    if isinstance(error, OSError):
        return Ending(USAGE if error.errno in _WRONG_PATH else ENVIRONMENT, _told(error))
    return Ending(BUG, f"this is a bug of continual: {type(error).__name__}: {error}; {_kept(error)}")


def _more(error: MemoryError) -> str:
    return f" ({error})" if str(error) else ""


def _told(error: OSError) -> str:
    """An error of the operating system, with the path that it is about."""
    about = [os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in (error.filename, error.filename2)]
    paths = " and ".join(name for name in about if name != "None")
    return f"{paths}: {error.strerror or error}" if paths else error.strerror or str(error) or type(error).__name__


def _kept(error: BaseException) -> str:
    """Where the trace of a bug is; how to get it, where it cannot be written."""
    if debugging():
        return "its trace is above"
    try:
        fd, name = tempfile.mkstemp(".txt", "continual-bug-")
        with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "run it with CONTINUAL_DEBUG=1 to see the trace"
    return f"the trace is in {name}, please send it to the maintainers"


def debugging() -> bool:
    """Whether traces are shown: asked for by `--debug` or CONTINUAL_DEBUG."""
    return os.environ.get("CONTINUAL_DEBUG", "") not in ("", "0")


def trace(error: BaseException) -> None:
    """Shows the trace of an error on standard error, where that was asked for."""
    if debugging():
        traceback.print_exception(error, file=sys.stderr)


def prepare() -> None:
    """Makes the standard streams such that nothing that is printed can fail because of its letters, and that no file of
    ours gets the number of one that was closed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Writes out what was said. Raises OSError where that cannot be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, "standard output") from error


def drop_output() -> None:
    """What standard output still holds goes nowhere: it could not be written, or something went wrong."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
