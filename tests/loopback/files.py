"""Routes that carry files: `resolve` on the API's origin, large files and their uploads on the CDN's, by links signed
for a time."""

from __future__ import annotations

import hashlib
import hmac
import re
import time

from tests.loopback import access
from tests.loopback.access import Refusal
from tests.loopback.hub import Hub
from tests.loopback.repos import Bytes
from tests.loopback.routing import Answer, Call, route
from tests.loopback.writing import writable


def signature(hub: Hub, path: str, expires: str) -> str:
    return hmac.new(hub.secret, f"{path} {expires}".encode(), "sha256").hexdigest()[:32]


def signed(hub: Hub, path: str) -> str:
    """A link to the CDN that is good for `link_seconds`."""
    expires = f"{time.time() + hub.link_seconds:.3f}"
    return f"{hub.cdn}{path}?expires={expires}&sig={signature(hub, path, expires)}"


def check_signed(call: Call) -> None:
    expires = call.param("expires")
    good = hmac.compare_digest(call.param("sig"), signature(call.hub, call.request.path, expires))
    if not good or float(expires) < time.time():
        raise Refusal(403, "Request has expired" if good else "Missing or bad signature")


def ranged(call: Call, data: Bytes, headers: dict[str, str]) -> Answer:
    """The bytes asked for: 206 with a slice for one range, 416 beyond the end, else 200 with all."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", call.request.range or "")
    if found is None or not any(found.groups()):
        return Answer(200, headers, data[:])
    size = len(data)
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Answer(206, headers, data[start : end + 1])


@route("GET", "/{repo}/resolve/{rev}/{path*}")
def resolve(call: Call) -> Answer:
    repo, commit = call.repo, call.commit()
    known = {"X-Repo-Commit": commit.sha}
    access.check_open(call.who, repo, known)
    blob = commit.files.get(call.args["path"])
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", known)
    if not blob.lfs:
        return ranged(call, blob.data, {**known, "ETag": f'"{blob.oid}"'})
    location = signed(call.hub, f"/cdn/{repo.id}/{blob.sha256}")
    headers = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"', "Location": location}
    return Answer(302, {**known, **headers, "Content-Type": "text/plain"}, b"Found. Redirecting")


@route("GET", "/cdn/{repo}/{oid}", origin="cdn")
def download(call: Call) -> Answer:
    check_signed(call)
    data = call.hub.objects.get(call.args["oid"])
    if data is None:
        raise Refusal(404, "No such object")
    return ranged(call, data, {"ETag": f'"{call.args["oid"]}"'})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def batch(call: Call) -> Answer:
    """Where to put each object; no actions for those the Hub has."""
    repo = writable(call)
    objects = []
    for wanted in call.json["objects"]:
        told = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.objects:
            upload = {"href": signed(call.hub, f"/lfs/{wanted['oid']}")}
            told["actions"] = {"upload": upload, "verify": {"href": f"{call.hub.endpoint}/{repo}.git/info/lfs/verify"}}
        objects.append(told)
    return Answer.json(
        {"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"}
    )


@route("PUT", "/lfs/{oid}", origin="cdn")
def upload(call: Call) -> Answer:
    check_signed(call)
    if hashlib.sha256(call.body).hexdigest() != call.args["oid"]:
        raise Refusal(400, "The content does not match its sha256")
    call.hub.objects[call.args["oid"]] = call.body
    return Answer(200, {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", "/{repo}.git/info/lfs/verify")
def verify(call: Call) -> Answer:
    writable(call)
    data = call.hub.objects.get(call.json["oid"])
    if data is None or len(data) != call.json["size"]:
        raise Refusal(404, "The object was not uploaded, or not all of it")
    return Answer.json({})
