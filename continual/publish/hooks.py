"""Telling a server that a new merged model is out: SGLang, vLLM, any URL, any command. One call is a few tries within
seconds; when to call is not decided here.

Requests, as they stand in the servers' sources. vLLM 0.32.0 was run against them (decision 0065); SGLang was read, in
0.5.23.

SGLang (UpdateWeightFromDiskReqInput): `POST /update_weights_from_disk`, answered by 200 and {"success": true,
"message"}, or by 400 and {"success": false, "message"}. It first waits for the requests under way, so `timeout` has to
be longer than they take. `flush_cache` is what it does by default.

SGLang's adapters (LoadLoRAAdapterReqInput): `POST /load_lora_adapter`, answered by 200 and {"success": true}, or by 400
and {"success": false, "error_message"}. It refuses a name that is there, earlier versions only once they had loaded the
adapter, which then stayed in their memory; so the old one is unloaded before, which waits for its requests.

vLLM (LoadLoRAAdapterRequest): `POST /v1/load_lora_adapter`, there only if vLLM runs with
VLLM_ALLOW_RUNTIME_LORA_UPDATING; plain text on success, 400 "has already been loaded" for a name that is, whatever the
new adapter is like. So that one is loaded under another name first, which is taken away again: what cannot be loaded
(500, a rank that is too large) leaves the old one in place. Then the name is unloaded and loaded, and for that moment
requests to it fail. `load_inplace` is not used: what was loaded with it is read again from its path at every step (vLLM
issue 33791). The prefix cache goes by the adapter's name and path, and the path is another one each time; that of
earlier versions goes by the name alone (42125), so that they may answer from the old one for a while.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import SplitResult, urlsplit

from continual.config import HookSettings
from continual.errors import Misconfigured
from continual.outside import Malformed, parse_fields
from continual.publish.plain_http import opener_for

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
LONGEST_TIMEOUT = 86400.0
MESSAGE = 300
"""Characters of a message at most."""
ANSWER = 64 << 10
"""Bytes of an answer or of a command's output that are looked at."""
TRIAL = ".trial"
"""What is put behind the name of an adapter that vLLM is to load for a trial."""
PREFIX = "PUBLISHED_"
"""Of the variables a command gets. Not CONTINUAL_: those are settings, and a hook may well run `continual`."""
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CONTINUAL_WEBHOOK_SECRET", "CONTINUAL_PROMOTE_TOKEN")
"""Variables that a command does not get."""
_PASSING = (408, 409, 425, 429)
_NO_ADAPTER = "there is no adapter directory to load: set `current`, and let the hook come after it"
_NO_PROGRAM = (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ENOEXEC, errno.EISDIR, errno.ELOOP, errno.E2BIG)


@dataclass(frozen=True, slots=True)
class Published:
    """What is out, as far as it is known. `view` is None for the merge. `directory` is on this machine: a model, or the
    adapter that a view is put out as; `lora` an adapter of the same merge or view. `mark` tells what is out at one
    record apart, where the settings of a view have changed."""

    state: str | None = None
    seq: int | None = None
    directory: Path | None = None
    lora: Path | None = None
    repo: str | None = None
    commit: str | None = None
    url: str | None = None
    tag: str | None = None
    view: str | None = None
    mark: str | None = None

    def facts(self) -> dict[str, object]:
        """What a server or a command is told."""
        return {key: value for key, value in asdict(self).items() if key != "mark"}


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


class _Tried(NamedTuple):
    """What became of one try; `again`: whether the next one may do better."""

    ok: bool
    message: str
    again: bool = False


class _Answer(NamedTuple):
    """The status and the text of an answer. Where there was none, the status is None and the text says why."""

    status: int | None
    text: str


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
        "sglang": _sglang,
        "sglang-lora": _sglang_lora,
        "vllm-lora": _vllm_lora,
        "http": _http,
        "command": _command,
    }[hook.kind]
    wait = wait or stop.wait
    begun = time.monotonic()
    attempts = 0
    tried = _Tried(False, "not told: continual is stopping", again=not stop.is_set())
    while tried.again and attempts < hook.tries:
        if attempts and wait(min(FIRST_WAIT * 2.0 ** (attempts - 1), LONGEST_WAIT)):
            break
        attempts += 1
        tried = once(hook, published, time.monotonic() + hook.timeout)
    return Called(hook.kind, target(hook), tried.ok, attempts, time.monotonic() - begun, _line(tried.message))


def _sglang(hook: HookSettings, published: Published, deadline: float) -> _Tried:
    if published.directory is None:
        return _Tried(False, "there is no model directory to load: set `current`, and let the hook come after it")
    # one record is out as something else once the settings say so
    marked = f"-{published.mark[:8]}" if published.mark else ""
    version = f"{(published.state or 'unknown')[:12]}-{published.seq}{marked}"
    asked = {"model_path": str(published.directory.absolute()), "weight_version": version, "flush_cache": True}
    return _succeeded(_post(f"{hook.url}".rstrip("/") + "/update_weights_from_disk", asked, deadline))


def _succeeded(answer: _Answer) -> _Tried:
    """What became of a try, of which SGLang also says in the answer whether it worked."""
    tried = _tried(answer)
    if tried.ok and _fields(answer.text).get("success") is not True:
        return _Tried(False, _with(f"HTTP {answer.status}, but no success", _said(answer.text)), again=True)
    return tried


def _sglang_lora(hook: HookSettings, published: Published, deadline: float) -> _Tried:
    if published.lora is None:
        return _Tried(False, _NO_ADAPTER)
    base = f"{hook.url}".rstrip("/")
    name = hook.served_as(published.view)
    gone = _post(f"{base}/unload_lora_adapter", {"lora_name": name}, deadline)
    if gone.status is None or gone.status >= 500 or gone.status in _PASSING:
        return _tried(gone)
    asked = {"lora_name": name, "lora_path": str(published.lora.absolute())}
    answer = _post(f"{base}/load_lora_adapter", asked, deadline)  # it says what is wrong, also where nothing was there
    if answer.status == 404:
        return _Tried(False, "HTTP 404: run an SGLang that loads adapters, with --enable-lora; url is without a path")
    return _succeeded(answer)


def _vllm_lora(hook: HookSettings, published: Published, deadline: float) -> _Tried:
    if published.lora is None:
        return _Tried(False, _NO_ADAPTER)
    base = f"{hook.url}".rstrip("/")
    load, unload = (f"{base}/v1/{what}_lora_adapter" for what in ("load", "unload"))
    name = {"lora_name": hook.served_as(published.view)}
    path = {"lora_path": str(published.lora.absolute())}
    answer = _post(load, name | path, deadline)
    # The oldest leave out the space.
    if answer.status == 400 and re.search(r"already been ?loaded", answer.text):
        trial = {"lora_name": name["lora_name"] + TRIAL}
        _post(unload, trial, deadline)  # a call that was cut off left it there
        tried = _tried(_post(load, trial | path, deadline))
        _post(unload, trial, deadline)
        if not tried.ok:
            return tried
        gone = _post(unload, name, deadline)
        if gone.status is None or gone.status >= 500:
            return _tried(gone)
        answer = _post(load, name | path, deadline)  # it says what is wrong, also where nothing was there to unload
    if answer.status == 404 and _said(answer.text) == "Not Found":
        return _Tried(
            False, "HTTP 404: run vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; url is without /v1"
        )
    return _tried(answer)


def _http(hook: HookSettings, published: Published, deadline: float) -> _Tried:
    body = {key: str(value) if isinstance(value, Path) else value for key, value in published.facts().items()}
    return _tried(_post(f"{hook.url}", body, deadline))


def _command(hook: HookSettings, published: Published, deadline: float) -> _Tried:
    """Runs a command in a session of its own, so that everything it started can be ended. Its output goes to a file: a
    pipe would stay open as long as anything it left running."""
    program, *arguments = hook.command
    facts = {key: "" if value is None else str(value) for key, value in published.facts().items()}
    filled = [re.sub(r"\{(" + "|".join(facts) + r")\}", lambda found: facts[found[1]], part) for part in arguments]
    environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
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
                return _Tried(False, _with(f"not done after {hook.timeout:g} s, ended", _last_line(output)), again=True)
            ended = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
            return _Tried(status == 0, _with(ended, _last_line(output)), again=status != 0)
    except OSError as error:
        return _Tried(False, f"cannot be run: {error.strerror}", again=error.errno not in _NO_PROGRAM)


def _post(url: str, body: Mapping[str, object], deadline: float) -> _Answer:
    """Posts JSON."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "continual"}
    )
    try:
        with opener_for(url).open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
            return _Answer(response.status, _read(response, deadline))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return _Answer(None, "no answer in time")
        if isinstance(error, http.client.InvalidURL | ValueError):  # their messages quote the URL
            return _Answer(None, "the URL cannot be used")
        return _Answer(None, str(getattr(reason, "strerror", None) or reason) or type(reason).__name__)


def _read(response: http.client.HTTPResponse, deadline: float) -> str:
    """The beginning of an answer, as much of it as came in time. That there is an answer is known by then."""
    read = b""
    try:
        while len(read) < ANSWER and time.monotonic() < deadline and (part := response.read1(ANSWER - len(read))):
            read += part
    except (OSError, http.client.HTTPException):
        pass
    return read.decode("utf-8", "replace")


def _tried(answer: _Answer) -> _Tried:
    if answer.status is None:
        return _Tried(False, answer.text, again=True)
    ok = 200 <= answer.status < 300
    said = "redirects are not followed" if 300 <= answer.status < 400 else _said(answer.text)
    return _Tried(ok, _with(f"HTTP {answer.status}", said), again=answer.status >= 500 or answer.status in _PASSING)


def _fields(text: str) -> dict[str, object]:
    """The fields of a JSON object; none for any other text."""
    try:
        return parse_fields(text.encode("utf-8", "replace"))
    except Malformed:
        return {}


def _said(text: str) -> str:
    """What an answer says: the text of the field in which such servers put it."""
    fields = _fields(text)
    inner = fields.get("error")
    told = fields.get("error_message") or fields.get("detail")
    said = (inner if isinstance(inner, dict) else fields).get("message") or told or inner or text
    return _line(said if isinstance(said, str) else json.dumps(said))


def target(hook: HookSettings) -> str:
    """What a hook calls, as it is logged and recorded: the program, or the URL without its query."""
    if hook.kind == "command":
        return _line(hook.command[0])
    parts = urlsplit(hook.url or "")
    return _line(SplitResult(parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "").geturl())


def _last_line(output: IO[bytes]) -> str:
    output.seek(max(output.seek(0, os.SEEK_END) - ANSWER, 0))
    lines = output.read().decode("utf-8", "replace").split("\n")
    return next((line for text in reversed(lines) if (line := _line(text))), "")


def _with(what: str, said: str) -> str:
    return f"{what}: {said}" if what and said else what or said


def _line(text: str) -> str:
    """A text on one line, printable and cut to MESSAGE characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 16 * MESSAGE]).split())
    return line if len(line) <= MESSAGE else f"{line[: MESSAGE - 1]}…"
