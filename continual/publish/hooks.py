"""Telling a server that a new merged model is out: SGLang, vLLM, any URL, any command. One call is a few tries within
seconds; when to call is not decided here. What servers of models are asked stands in
`servers.py`.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.parse import SplitResult, urlsplit

from continual.config import HookSettings
from continual.errors import Misconfigured
from continual.publish import servers, webhook_signatures
from continual.publish.posting import ANSWER, HookTry, joined, line, post, tried_by
from continual.publish.published import Published

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
LONGEST_TIMEOUT = 86400.0
PREFIX = "PUBLISHED_"
"""Of the variables a command gets. Not CONTINUAL_: those are settings, and a hook may well run `continual`."""
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CONTINUAL_WEBHOOK_SECRET", "CONTINUAL_PROMOTE_TOKEN")
"""Variables that a command does not get."""
_NO_PROGRAM = (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ENOEXEC, errno.EISDIR, errno.ELOOP, errno.E2BIG)


@dataclass(frozen=True, slots=True)
class Called:
    """What became of a call. `target` is the URL without its query, or the program; `attempts` and `seconds` count all
    tries, the seconds also the waits between them."""

    kind: str
    target: str
    ok: bool
    attempts: int
    seconds: float
    message: str

    def body(self) -> dict[str, object]:
        """The fields as a log line has them; the seconds to the millisecond."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


def check(hooks: Sequence[HookSettings]) -> None:
    """Raises Misconfigured for what is missing, contradictory or cannot be used."""
    for number, hook in enumerate(hooks, 1):
        if wrong := _wrong(hook):
            raise Misconfigured(f"hook {number} ({hook.kind}): {wrong}")


def _wrong(hook: HookSettings) -> str | None:
    if hook.timeout > LONGEST_TIMEOUT:
        return f"timeout = {hook.timeout}: at most {LONGEST_TIMEOUT:.0f} seconds"
    if not hook.serves_lora and (given := hook.model_fields_set & {"name", "rank"}):
        return f"{min(given)} is for sglang-lora and vllm-lora"
    if hook.serves_lora and not hook.served_as("view").strip():
        return "name is empty: it is what the adapter is served as"
    if hook.serves_lora and hook.view is None and "{view}" in hook.name:
        return 'name has {view} in it, and the hook is told of the merge alone: set view, as "*"'
    if hook.secret is not None:
        if hook.kind != "http":
            return "secret is for http"
        try:
            webhook_signatures.key(hook.secret.get_secret_value())
        except ValueError as error:
            return str(error)
    if hook.kind == "command":
        if hook.url is not None:
            return "url is for the other kinds; a command gets it among its arguments"
        if not hook.command or not hook.command[0].strip():
            return 'command is missing: a list, as ["deploy", "{directory}"]'
        return "command has a NUL character in it" if any("\0" in part for part in hook.command) else None
    return "command is for the kind command" if hook.command else _wrong_url(hook)


def _wrong_url(hook: HookSettings) -> str | None:
    """What is wrong with its URL. The URL is never quoted: its query may be a secret."""
    if not hook.url:
        return "url is missing"
    if not (hook.url.isascii() and hook.url.isprintable()) or " " in hook.url:
        return "url has characters in it that have to be percent-encoded"
    parts = _split(hook.url)
    if parts is None:
        return "url cannot be read; is its port a number?"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "url has to begin with http:// or https:// and a host"
    if "@" in parts.netloc:
        return "url has credentials in it, which would be logged and kept in the ledger; leave them out"
    if hook.kind != "http" and (parts.query or parts.fragment):
        return "url is where the server listens, as http://127.0.0.1:30000, with nothing after ? or #"
    return None


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None if it cannot be read, or its port is no number below 65536."""
    try:
        parts = urlsplit(url)
        return parts if parts.port is None or parts.port >= 0 else None
    except ValueError:
        return None


def call(
    hook: HookSettings, published: Published, stop: threading.Event, wait: Callable[[float], bool] | None = None
) -> Called:
    """Tells one server of what is published; blocks until that worked, the tries are used up, or `stop` is set. Takes a
    `hook` that passed `check`.

    Never raises for what the other side does. `stop` ends the waits between tries, not a try under way: that has
    `timeout` seconds. `wait` waits so many seconds and returns whether to stop; the default waits for `stop`.
    """
    once = {
        "sglang": servers.sglang,
        "sglang-lora": servers.sglang_lora,
        "vllm": servers.vllm,
        "vllm-lora": servers.vllm_lora,
        "http": _http,
        "command": _command,
    }[hook.kind]
    wait = wait or stop.wait
    begun = time.monotonic()
    attempts = 0
    tried = HookTry(False, "not told: continual is stopping", again=not stop.is_set())
    while tried.again and attempts < hook.tries:
        if attempts and wait(min(FIRST_WAIT * 2.0 ** (attempts - 1), LONGEST_WAIT)):
            break
        attempts += 1
        tried = once(hook, published, time.monotonic() + hook.timeout)
    return Called(hook.kind, target(hook), tried.ok, attempts, time.monotonic() - begun, line(tried.message))


def _http(hook: HookSettings, published: Published, deadline: float) -> HookTry:
    body = {key: str(value) if isinstance(value, Path) else value for key, value in published.facts().items()}

    def sign(data: bytes) -> dict[str, str]:
        if hook.secret is None:
            return {}
        of = (published.state, published.seq, published.view, published.mark, published.commit, target(hook))
        secret = webhook_signatures.key(hook.secret.get_secret_value())
        return webhook_signatures.headers(secret, webhook_signatures.message_id(*of), int(time.time()), data)

    return tried_by(post(f"{hook.url}", body, deadline, sign))


def _command(hook: HookSettings, published: Published, deadline: float) -> HookTry:
    """Runs a command in a session of its own, so that everything it started can be ended. Its output goes to a file: a
    pipe would stay open as long as anything it left running."""
    program, *arguments = hook.command
    facts = {key: "" if value is None else str(value) for key, value in published.facts().items()}
    filled = [re.sub(r"\{(" + "|".join(facts) + r")\}", lambda found: facts[found[1]], part) for part in arguments]
    environment = {key: value for key, value in os.environ.items() if not _is_secret(key, value)}
    environment |= {PREFIX + key.upper(): value for key, value in facts.items()}
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [program, *filled],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
            try:
                status = process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the group is there
                process.wait()
                return HookTry(
                    False, joined(f"not done after {hook.timeout:g} s, ended", _last_line(output)), again=True
                )
            ended = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
            return HookTry(status == 0, joined(ended, _last_line(output)), again=status != 0)
    except OSError as error:
        return HookTry(False, f"cannot be run: {error.strerror}", again=error.errno not in _NO_PROGRAM)


def _is_secret(name: str, value: str) -> bool:
    """Whether a variable is for nobody but this process."""
    ours = name.startswith("CONTINUAL_") and name.endswith(("_SECRET", "_TOKEN"))
    return ours or name in SECRETS or value.startswith(webhook_signatures.PREFIX)


def target(hook: HookSettings) -> str:
    """What a hook calls, as it is logged and recorded: the program, or the URL without its query."""
    if hook.kind == "command":
        return line(hook.command[0])
    parts = urlsplit(hook.url or "")
    return line(SplitResult(parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "").geturl())


def _last_line(output: IO[bytes]) -> str:
    output.seek(max(output.seek(0, os.SEEK_END) - ANSWER, 0))
    lines = output.read().decode("utf-8", "replace").split("\n")
    return next((one for text in reversed(lines) if (one := line(text))), "")
