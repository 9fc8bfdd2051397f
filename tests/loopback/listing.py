"""Routes that only tell: lists of models, a model, its tree, paths, commits and refs, and who one is."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

from tests.loopback import access, cards
from tests.loopback.access import Refusal
from tests.loopback.repos import Blob, Commit, Repo, folder_oid, tree
from tests.loopback.routing import Answer, Call, page_link, route

LISTED = ("likes", "private", "downloads", "tags", "library_name", "pipeline_tag", "createdAt")
FULL = ("author", "sha", "lastModified", "gated", "siblings")
MODEL = (
    "author",
    "sha",
    "lastModified",
    "disabled",
    "cardData",
    "gated",
    "siblings",
    "spaces",
    "usedStorage",
    "safetensors",
)


def date(seconds: float) -> str:
    """A date as the Hub writes it, with milliseconds."""
    whole, thousandths = divmod(int(seconds * 1000), 1000)
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{thousandths:03}Z"


def sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path}
    if blobs:
        found |= {"size": blob.size, "blobId": blob.oid}
        if blob.lfs:
            found["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return found


def model(repo: Repo, commit: Commit | None, fields: Sequence[str], *, blobs: bool = False) -> dict[str, Any]:
    """A model as JSON, with these fields; those that it has not are left out."""
    files: Mapping[str, Blob] = commit.files if commit else {}
    data = cards.card(files)
    relation, models = cards.bases(files)
    known: dict[str, Any] = {
        "author": repo.owner,
        "baseModels": {"relation": relation, "models": [{"id": m} for m in models]} if models else None,
        "cardData": json.loads(json.dumps(data, default=str)) or None,
        "childrenModelCount": None,
        "config": None,
        "createdAt": date(repo.created),
        "disabled": False,
        "downloads": 0,
        "downloadsAllTime": 0,
        "gated": repo.gated,
        "lastModified": date(repo.modified),
        "library_name": data.get("library_name"),
        "likes": 0,
        "pipeline_tag": data.get("pipeline_tag"),
        "private": repo.private,
        "safetensors": cards.parameters(files) if "safetensors" in fields else None,
        "sha": commit.sha if commit else None,
        "siblings": [sibling(path, blob, blobs) for path, blob in sorted(files.items())],
        "spaces": [],
        "tags": cards.tags(files),
        "trendingScore": 0,
        "usedStorage": sum(blob.size for blob in files.values()),
    }
    unknown = set(fields) - set(known)
    if unknown:
        raise Refusal(400, f"Invalid expand: {', '.join(sorted(unknown))}")
    return {"_id": repo.key, "id": repo.id, "modelId": repo.id} | {f: known[f] for f in fields if known[f] is not None}


@route("GET", "/api/models")
def list_models(call: Call) -> Answer:
    """Newest or as ordered first, a page at a time. The cursor names the last one seen, so that a model which moves to
    the top while somebody pages is missed by them, as on the Hub."""
    sort = call.param("sort")
    wanted, author, search = set(call.params("filter")), call.param("author"), call.param("search").lower()
    found: list[tuple[tuple[float, str], Repo]] = []
    for repo in call.hub.state(call.ago).values():
        if not access.sees(call.who, repo) or (author and repo.owner != author) or search not in repo.id.lower():
            continue
        if wanted <= set(cards.tags(repo.head.files if repo.head else {})):
            value = {"lastModified": repo.modified, "createdAt": repo.created}.get(sort, 0.0)
            found.append(((-int(value * 1000), repo.key), repo))
    found.sort(key=lambda item: item[0])
    if cursor := call.param("cursor"):
        after = json.loads(base64.urlsafe_b64decode(cursor))
        found = [item for item in found if item[0] > (after[0], after[1])]
    size = min(int(call.param("limit") or call.hub.page_size), call.hub.page_size)
    page, more = found[:size], len(found) > size
    fields = call.params("expand") or [*LISTED, *(FULL if call.flag("full") else ())] + (
        ["cardData"] if call.flag("cardData") else []
    )
    headers = {}
    if more:
        headers = page_link(call, base64.urlsafe_b64encode(json.dumps(page[-1][0]).encode()).decode())
    return Answer.json([model(repo, repo.head, fields) for _, repo in page], headers=headers)


@route("GET", "/api/models/{repo}")
@route("GET", "/api/models/{repo}/revision/{rev}")
def model_info(call: Call) -> Answer:
    repo = call.repo
    commit = call.commit() if "rev" in call.args or repo.head else None
    fields = call.params("expand") or [*LISTED, *MODEL]
    return Answer.json(model(repo, commit, fields, blobs=call.flag("blobs")))


@route("GET", "/api/models/{repo}/tree/{rev}")
@route("GET", "/api/models/{repo}/tree/{rev}/{path*}")
def list_tree(call: Call) -> Answer:
    commit, folder = call.commit(), call.args.get("path", "").strip("/")
    entries = tree(commit.files, folder, recursive=call.flag("recursive"))
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist on {commit.sha}", "EntryNotFound")
    start = int(call.param("cursor") or 0)
    end = start + min(int(call.param("limit") or call.hub.page_size), call.hub.page_size)
    headers = page_link(call, str(end)) if end < len(entries) else {}
    return Answer.json([entry(call, commit, p, b, call.flag("expand")) for p, b in entries[start:end]], headers=headers)


def entry(call: Call, commit: Commit, path: str, blob: Blob | None, expand: bool) -> dict[str, Any]:
    """A file or a folder as the tree shows it."""
    if blob is None:
        found: dict[str, Any] = {"type": "directory", "oid": folder_oid(commit.files, path), "size": 0, "path": path}
    else:
        found = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if blob.lfs:
            found["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    if expand:
        last = call.repo.last_change(commit, path)
        found["lastCommit"] = {"id": last.sha, "title": last.title, "date": date(last.date)}
    return found


@route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(call: Call) -> Answer:
    """Those of the paths that exist."""
    commit = call.commit()
    form = call.json if "json" in call.request.headers.get("content-type", "") else parse_qs(call.body.decode())
    expand = str(form.get("expand", [""])).lower().strip("[]'\"") in ("true", "1")
    found = []
    for path in form.get("paths", []):
        blob = commit.files.get(path)
        if blob is not None or any(other.startswith(path + "/") for other in commit.files):
            found.append(entry(call, commit, path, blob, expand))
    return Answer.json(found)


@route("GET", "/api/models/{repo}/commits/{rev}")
def list_commits(call: Call) -> Answer:
    commits = list(call.repo.history(call.commit()))
    start = int(call.param("cursor") or 0)
    end = start + call.hub.page_size
    return Answer.json(
        [
            {"id": c.sha, "title": c.title, "message": c.message, "date": date(c.date), "authors": [{"user": c.author}]}
            for c in commits[start:end]
        ],
        headers=page_link(call, str(end)) if end < len(commits) else {},
    )


@route("GET", "/api/models/{repo}/refs")
def list_refs(call: Call) -> Answer:
    def refs(kind: str, found: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in found.items()]

    repo = call.repo
    return Answer.json(
        {"branches": refs("heads", repo.branches), "converts": [], "tags": refs("tags", repo.tags), "pullRequests": []}
    )


@route("GET", "/api/models/{repo}/auth-check")
def auth_check(call: Call) -> Answer:
    access.check_open(call.who, call.repo, {})
    return Answer.json({})


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    who = access.member(call.who)
    token = {"accessToken": {"displayName": "tests", "role": "write"}, "type": "access_token"}
    orgs = [{"name": org, "type": "org"} for org in sorted(who.orgs - {"*"})]
    return Answer.json({"type": "user", "name": who.user, "fullname": who.user, "orgs": orgs, "auth": token})
