"""Routes that change: repositories, settings, branches and tags, and commits with what goes before them. Large files
are in `files`."""

from __future__ import annotations

import base64
import json
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.loopback import access
from tests.loopback.access import Refusal
from tests.loopback.repos import Blob
from tests.loopback.routing import Answer, Call, route


def named(call: Call) -> str:
    """The repository that the body names; without an organisation it is the user's own."""
    data = call.json
    if data.get("type") not in (None, "model"):
        raise Refusal(400, "This Hub has models only")
    return f"{data.get('organization') or access.member(call.who).user}/{data['name']}"


@route("POST", "/api/repos/create")
def create(call: Call) -> Answer:
    name = named(call)
    who = access.check_write(call.who, name.partition("/")[0])
    body = {"url": f"{call.hub.endpoint}/{name}", "name": name}
    if name in call.hub.state():
        # `exist_ok` reads the URL out of the refusal
        return Answer.json({"error": "You already created this model repo", **body}, 409)
    private = call.json.get("visibility") == "private" or call.json.get("private") is True
    call.hub.create(name, private=private, author=who.user)
    return Answer.json({**body, "id": call.hub.repo(name).key})


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Answer:
    name = named(call)
    access.member(call.who)
    if name not in call.hub.state():
        raise access.missing(call.who)
    access.check_write(call.who, name.partition("/")[0])
    call.hub.delete(name)
    return Answer()


@route("POST", "/api/repos/move")
def move(call: Call) -> Answer:
    access.member(call.who)
    old, new = call.json["fromRepo"], call.json["toRepo"]
    if old not in call.hub.state():
        raise access.missing(call.who)
    for name in (old, new):
        access.check_write(call.who, name.partition("/")[0])
    call.hub.move(old, new)
    return Answer.json({})


@route("PUT", "/api/models/{repo}/settings")
def settings(call: Call) -> Answer:
    repo, data = writable(call), call.json
    if "gated" in data:
        call.hub.gate(repo, data["gated"])
    if "visibility" in data or "private" in data:
        call.hub.hide(repo, data.get("visibility") == "private" or data.get("private") is True)
    return Answer.json(data)


@route("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(call: Call) -> Answer:
    call.hub.tag(writable(call), call.json["tag"], call.args["rev"])
    return Answer.json({})


@route("DELETE", "/api/models/{repo}/tag/{rev}")
def delete_tag(call: Call) -> Answer:
    call.hub.tag(writable(call), call.args["rev"], None)
    return Answer()


@route("POST", "/api/models/{repo}/branch/{branch}")
def create_branch(call: Call) -> Answer:
    call.hub.branch(writable(call), call.args["branch"], call.json.get("startingPoint") or "main")
    return Answer.json({})


@route("DELETE", "/api/models/{repo}/branch/{branch}")
def delete_branch(call: Call) -> Answer:
    call.hub.branch(writable(call), call.args["branch"], None)
    return Answer()


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    """Refuses front matter that is not YAML; knows nothing of the card's fields."""
    text = call.json["content"]
    try:
        yaml.safe_load(text[4:].partition("\n---")[0] if text.startswith("---\n") else "")
    except yaml.YAMLError as error:
        return Answer.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Answer.json({"errors": [], "warnings": []})


@route("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(call: Call) -> Answer:
    """Which files are to go as large ones, and what the Hub has under these paths."""
    writable(call)
    commit = call.commit() if call.repo.branches else None
    files = []
    for file in call.json["files"]:
        path = file["path"]
        large = call.hub.is_large(path, file["size"])
        old = commit.files.get(path) if commit else None
        told = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append(told | ({"oid": old.etag} if old else {}))
    return Answer.json({"files": files, "commitOid": commit.sha if commit else None})


@route("POST", "/api/models/{repo}/commit/{rev}")
def commit(call: Call) -> Answer:
    """A commit of NDJSON lines. All of it happens or none."""
    repo = writable(call)
    head = call.commit().files if call.repo.branches else {}
    header: dict[str, Any] = {}
    files: dict[str, Blob | None] = {}
    for line in call.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = stored(call, value["oid"])
        elif key == "deletedFile":
            files[value["path"]] = None
        elif key == "deletedFolder":
            below = [path for path in head if path.startswith(value["path"].rstrip("/") + "/")]
            if not below:
                raise Refusal(404, f"A folder with this name doesn't exist: {value['path']}", "EntryNotFound")
            files |= dict.fromkeys(below)
        else:
            raise Refusal(400, f"Unknown operation {key}")
    message = "\n\n".join(part for part in (header.get("summary"), header.get("description")) if part)
    author = access.member(call.who).user
    if call.flag("create_pr"):
        if header.get("parentCommit") not in (None, call.repo.branches.get("main")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        number = call.hub.propose(repo, files, header["summary"], header.get("description", ""), author=author)
        sha = call.hub.repo(repo).requests[number].sha
        where = {"pullRequestUrl": f"{call.hub.endpoint}/{repo}/discussions/{number}"}
        return Answer.json({"success": True, "commitOid": sha, "commitUrl": "", "hookOutput": "", **where})
    sha = call.hub.commit(
        repo, files, message, branch=call.args["rev"], parent=header.get("parentCommit"), author=author
    )
    return Answer.json(
        {"success": True, "commitOid": sha, "commitUrl": f"{call.hub.endpoint}/{repo}/commit/{sha}", "hookOutput": ""}
    )


def stored(call: Call, oid: str) -> Blob:
    data = call.hub.objects.get(oid)
    if data is None:
        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {oid}")
    return Blob(data, lfs=True)


def writable(call: Call) -> str:
    """The repository of the path, which they must see and may write."""
    repo = call.repo
    access.check_write(call.who, repo.owner)
    return repo.id
