"""Servers of language models that are told of a new merge: what each is asked.

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

vLLM's whole weights (its development mode, VLLM_SERVER_DEV_MODE=1): `POST /pause?mode=wait` lets the requests under way
end and forgets its caches, `POST /collective_rpc` with the method `reload_weights` and the path loads the weights over
the old ones, `POST /resume` goes on. Where the loading itself failed the weights may be half of each, so that it stays
paused: silence is better than such answers. Nor is it asked again: what a load that failed leaves behind in vLLM goes
into the next, which may say that all is well. So one that `GET /is_paused` says is paused is left alone.
"""

from __future__ import annotations

import re
import time

from continual.config import HookSettings
from continual.publish.posting import HookTry, Posted, fields, get, joined, post, said_in, tried_by
from continual.publish.published import Published

TRIAL = ".trial"
"""What is put behind the name of an adapter that vLLM is to load for a trial."""
_NO_ADAPTER = "there is no adapter directory to load: set `current`, and let the hook come after it"
_PAUSED = "it is paused already: start it anew where a load failed, else have it go on by POST /resume"
_NO_MODEL = "there is no model directory to load: set `current`, and let the hook come after it"


def sglang(hook: HookSettings, published: Published, deadline: float) -> HookTry:
    """Has SGLang load a model directory."""
    if published.directory is None:
        return HookTry(False, _NO_MODEL)
    # one record is out as something else once the settings say so
    marked = f"-{published.mark[:8]}" if published.mark else ""
    version = f"{(published.state or 'unknown')[:12]}-{published.seq}{marked}"
    asked = {"model_path": str(published.directory.absolute()), "weight_version": version, "flush_cache": True}
    return _succeeded(post(f"{hook.url}".rstrip("/") + "/update_weights_from_disk", asked, deadline))


def _succeeded(answer: Posted) -> HookTry:
    """What became of a try, of which SGLang also says in the answer whether it worked."""
    tried = tried_by(answer)
    if tried.ok and fields(answer.text).get("success") is not True:
        return HookTry(False, joined(f"HTTP {answer.status}, but no success", said_in(answer.text)), again=True)
    return tried


def sglang_lora(hook: HookSettings, published: Published, deadline: float) -> HookTry:
    """Has SGLang load an adapter in place of the one before."""
    if published.lora is None:
        return HookTry(False, _NO_ADAPTER)
    base = f"{hook.url}".rstrip("/")
    name = hook.served_as(published.view)
    gone = post(f"{base}/unload_lora_adapter", {"lora_name": name}, deadline)
    if gone.passes:
        return tried_by(gone)
    asked = {"lora_name": name, "lora_path": str(published.lora.absolute())}
    answer = post(f"{base}/load_lora_adapter", asked, deadline)  # it says what is wrong, also where nothing was there
    if answer.status == 404:
        return HookTry(False, "HTTP 404: run an SGLang that loads adapters, with --enable-lora; url is without a path")
    return _succeeded(answer)


def vllm_lora(hook: HookSettings, published: Published, deadline: float) -> HookTry:
    """Has vLLM load an adapter in place of the one before."""
    if published.lora is None:
        return HookTry(False, _NO_ADAPTER)
    base = f"{hook.url}".rstrip("/")
    load, unload = (f"{base}/v1/{what}_lora_adapter" for what in ("load", "unload"))
    name = {"lora_name": hook.served_as(published.view)}
    path = {"lora_path": str(published.lora.absolute())}
    answer = post(load, name | path, deadline)
    # The oldest leave out the space.
    if answer.status == 400 and re.search(r"already been ?loaded", answer.text):
        trial = {"lora_name": name["lora_name"] + TRIAL}
        post(unload, trial, deadline)  # a call that was cut off left it there
        tried = tried_by(post(load, trial | path, deadline))
        post(unload, trial, deadline)
        if not tried.ok:
            return tried
        gone = post(unload, name, deadline)
        if gone.status is None or gone.status >= 500:
            return tried_by(gone)
        answer = post(load, name | path, deadline)  # it says what is wrong, also where nothing was there to unload
    if answer.status == 404 and said_in(answer.text) == "Not Found":
        return HookTry(
            False, "HTTP 404: run vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; url is without /v1"
        )
    return tried_by(answer)


def vllm(hook: HookSettings, published: Published, deadline: float) -> HookTry:
    """Has vLLM load the weights of a model directory over those that it serves."""
    if published.directory is None:
        return HookTry(False, _NO_MODEL)
    base = f"{hook.url}".rstrip("/")
    if fields(get(f"{base}/is_paused", deadline).text).get("is_paused") is True:
        return HookTry(False, _PAUSED)
    paused = post(f"{base}/pause?mode=wait", {}, deadline)
    if paused.status == 404:
        return HookTry(
            False, "HTTP 404: run vLLM with VLLM_SERVER_DEV_MODE=1, on an address that only this box reaches"
        )
    if not tried_by(paused).ok:
        return tried_by(paused)
    path = {"weights_path": str(published.directory.absolute())}
    asked = {"method": "reload_weights", "kwargs": path, "timeout": max(deadline - time.monotonic(), 0.001)}
    loaded = tried_by(post(f"{base}/collective_rpc", asked, deadline))
    if loaded.ok or not loaded.again:  # what was not even accepted has changed nothing
        resumed = tried_by(post(f"{base}/resume", {}, deadline))
        return loaded if resumed.ok or not loaded.ok else resumed._replace(message=f"loaded; {resumed.message}")
    told = f"{loaded.message}; it stays paused, since its weights may be half of each: start it anew"
    return HookTry(False, told)
