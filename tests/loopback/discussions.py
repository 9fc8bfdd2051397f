"""Routes of pull requests: they are opened by a commit (`writing`), listed, commented on, merged and closed."""

from __future__ import annotations

from typing import Any

from tests.loopback import access
from tests.loopback.listing import date
from tests.loopback.repos import PullRequest, Repo
from tests.loopback.routing import Answer, Call, route


def told(repo: Repo, found: PullRequest) -> dict[str, Any]:
    """A pull request as the Hub tells of it."""
    return {
        "num": found.number,
        "title": found.title,
        "status": found.status,
        "author": {"name": found.author},
        "createdAt": date(found.date),
        "isPullRequest": True,
        "repo": {"name": repo.id, "type": "model"},
    }


@route("GET", "/api/models/{repo}/discussions")
def list_discussions(call: Call) -> Answer:
    repo, status = call.repo, call.param("status")
    found = [pull for pull in repo.requests.values() if status in ("", "all", pull.status)]
    start = int(call.param("p") or 0) * 10
    page = [told(repo, pull) for pull in sorted(found, key=lambda pull: -pull.number)[start : start + 10]]
    return Answer.json({"discussions": page, "count": len(found), "start": start})


@route("GET", "/api/models/{repo}/discussions/{num}")
def discussion(call: Call) -> Answer:
    repo = call.repo
    found = call.hub.pull(repo.id, call.args["num"])
    events = [
        {
            "id": str(number),
            "type": "comment",
            "createdAt": date(found.date),
            "author": {"name": author},
            "data": {"edited": False, "hidden": False, "latest": {"raw": text}},
        }
        for number, (author, text) in enumerate([(found.author, found.description), *found.comments])
    ]
    changes = {"base": "refs/heads/main", **({"mergeCommitId": found.merged} if found.merged else {})}
    return Answer.json(told(repo, found) | {"events": events, "changes": changes, "filesWithConflicts": []})


@route("POST", "/api/models/{repo}/discussions/{num}/comment")
def comment(call: Call) -> Answer:
    who = access.member(call.who)
    call.hub.discuss(call.repo.id, call.args["num"], comment=(who.user, call.json["comment"]))
    event = {"id": "1", "type": "comment", "createdAt": date(call.hub.clock()), "author": {"name": who.user}}
    data = {"edited": False, "hidden": False, "latest": {"raw": call.json["comment"]}}
    return Answer.json({"newMessage": {**event, "data": data}})


@route("POST", "/api/models/{repo}/discussions/{num}/status")
def status(call: Call) -> Answer:
    who = access.check_write(call.who, call.repo.owner)
    said = call.json.get("comment")
    call.hub.discuss(
        call.repo.id, call.args["num"], status=call.json["status"], comment=(who.user, said) if said else None
    )
    event = {"id": "1", "type": "status-change", "createdAt": date(call.hub.clock()), "author": {"name": who.user}}
    return Answer.json({"newStatus": {**event, "data": {"status": call.json["status"]}}})


@route("POST", "/api/models/{repo}/discussions/{num}/merge")
def merge(call: Call) -> Answer:
    who = access.check_write(call.who, call.repo.owner)
    call.hub.merge(call.repo.id, call.args["num"], author=who.user)
    return Answer.json({})
