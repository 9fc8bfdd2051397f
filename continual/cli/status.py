"""What `continual status` prints for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from continual.cli.answered import ranges
from continual.outside import counted
from continual.texts import duration, paused_since, plain, scale, share, size, when

_MACHINES = 12
"""Machines of a cluster that are shown."""


def text(body: Mapping[str, Any]) -> str:
    """A status for people."""
    sources = _sources(body)
    says_why = body["why"] and (not body["degraded"] or body["health"] == "stopping")
    lines = [
        f"{body['health']}{': ' + body['why'] if says_why else ''}"
        + (f", process {body['pid']} at {body['url']}" if body["pid"] else ""),
        (
            f"state      {body['state']}, record {body['head']}, {body['folds']} folded, "
            f"{size(body['state_bytes'])} a generation, {body['generations']} kept"
        ),
        f"back       records {ranges(body.get('back', ()))} can be gone back to",
        f"base       {body['base']}",
        *_form(body.get("form")),
        f"rule       {body['rule']}{_options(body['options'])}, scale {scale(body['scale'], body.get('tuned'))}"
        + "".join(f", {k} {v:.4g}" for k, v in body["gauges"].items()),
    ]
    lines[1:1] = [f"{row['reason']:<10} {row['message']}" for row in body["degraded"]]
    if body["uptime_seconds"] is not None:
        watched = ", ".join([*body["watch"], *(_title(name, told) for name, told in sources.items())]) or "nothing"
        lines.append(
            f"up         {duration(body['uptime_seconds'])}, peak memory "
            f"{size(body['peak_memory_bytes'])}, watching {watched}"
        )
    if body["current"]:
        lines.append(
            f"folding    {body['current']['model']}: {body['current']['stage']} "
            f"{body['current']['done']}/{body['current']['total']}"
        )
    lines += _cluster(body.get("cluster"))
    if body.get("paused") is not None and not body["pid"]:
        lines.append(f"paused     {paused_since(body['paused'])}")
    failed = [row for row in body["queue"] if row["failures"]]
    names = [row["model"] for row in body["queue"] if not row["failures"]]
    more = body["queued"] - len(body["queue"])
    if names or more or not failed:
        lines.append(f"waiting    {', '.join(names) or 'nothing'}{f' and {more} more' if more else ''}")
    lines += [
        f"failed     {row['model']}, {row['failures']} times: {row['error']}; next try {when(row['next_try'])}"
        for row in failed
    ]
    lines += [_source(name, told) for name, told in sources.items()]
    lines += [f"note       {note}" for note in body["notes"]]
    if body["select"] != "none":
        last = body["last_round"]
        told = (
            f"; last round {when(last['time'])}: record {last['seq']}, loss {last['before']:.4g} to "
            f"{last['loss']:.4g}, gap {last['gap']:.3g}"
            if last
            else "; no round yet"
        )
        lines.append(f"pool       {body['pool_size']} wait for a round ({body['select']}){told}")
    lines += [_fold(fold) for fold in body["last_folds"][:5]]
    lines += [f"published  {when(p['time'])}  {p['seq']}  {p['message']}" for p in body["published"][:3]]
    lines += [_canary(found) for found in body.get("canaries", ())]
    lines += [_view(view) for view in body.get("views", ())]
    lines += [f"refused    {when(r['time'])}  {r['seq']}  {r['model']}: {r['reason']}" for r in body["refusals"][:5]]
    return "\n".join(plain(line) for line in lines)


def _cluster(found: Mapping[str, Any] | None) -> list[str]:
    """The cluster that does the work: its machines, and the orders. A daemon of an earlier version does not say it."""
    if not found:
        return []
    lines = [f"cluster    {found['address']}{_has(found)}"]
    lines += [f"cluster    {found['problem']}"] if found["problem"] else []
    under_way = f"{found['done']} of {found['total']} done, {found['out']} out; " if found["total"] else ""
    failed = f", {found['failed']} that a machine could not do" if found["failed"] else ""
    lines.append(f"orders     {under_way}{found['work']['orders']} done by this process, {found['lost']} lost{failed}")
    lines += [f"avoided    {one['address']} until {when(one['until'])}: {one['why']}" for one in found["avoided"][:5]]
    lines += [_out(one) for one in found["orders"][:5]]
    lines += [_node(one, connected=found["connected"]) for one in found["nodes"][:_MACHINES]]
    more = len(found["nodes"]) - _MACHINES
    if more > 0:
        lines.append(f"machine    and {more} more: the page shows them, and --json")
    return lines


def _has(found: Mapping[str, Any]) -> str:
    """The machines that are alive, and what they have."""
    if not found["answered"]:
        return ": which machines it has is asked when there is work for it"
    if not found["connected"]:
        return ""
    has = f"{_cores(found)}, {size(found['memory_bytes'])} and {found['gpus']:g} GPUs for orders"
    return f", {counted(found['alive'], 'machine')} alive: {has}, as of {when(found['answered'])}"


def _cores(of: Mapping[str, Any]) -> str:
    return "1 core" if of["cores"] == 1 else f"{of['cores']:g} cores"


def _out(one: Mapping[str, Any]) -> str:
    """An order that is out."""
    more = f" and {one['tensors'] - 1} more" if one["tensors"] > 1 else ""
    before = f", lost {counted(one['lost'], 'time')} before" if one["lost"] else ""
    on = f", on {one['machine']} since {when(one['began'])}" if one["began"] else ""
    return f"out        {one['tensor']}{more}, since {when(one['since'])}{on}{before}"


def _node(one: Mapping[str, Any], *, connected: bool) -> str:
    """A machine of the cluster."""
    alive = "gone" if not one["alive"] else _cores(one) if connected else "not known whether it is alive"
    if not one["heard"]:
        now = f"works on {one['on']}" if one["on"] else "no order yet"
        return f"machine    {one['address']}, {alive}: {now}"
    heard = f"last heard of {when(one['heard'])} with {one['last']}"
    return f"machine    {one['address']}, {alive}: {_work(one['work'])}; {heard}"


def _work(work: Mapping[str, Any]) -> str:
    return f"{counted(work['orders'], 'order')}, {size(work['read_bytes'])} read in {duration(work['seconds'])}"


def _options(options: Mapping[str, object]) -> str:
    """The options of the rule; those that say nothing, as an empty list of globs, are left out."""
    said = [f"{key}={value}" for key, value in options.items() if value not in ([], None)]
    return f" ({', '.join(said)})" if said else ""


def _form(form: Mapping[str, Any] | None) -> list[str]:
    """What a state of adapters keeps, how full it is and what was cut off. A daemon of an earlier version does not say
    it."""
    if not form or form["width"] is None:
        return []
    full = (
        ""
        if form["used"] is None
        else f", the fullest layer has {form['used']}; {share(form['cut'])} of what they change was cut off"
    )
    return [f"keeps      adapters, at most {form['width']} singular triplets a layer{full}"]


def _fold(fold: Mapping[str, Any]) -> str:
    """A fold, with what was cut off, what was left out, and what gates warned of."""
    return (
        f"folded     {when(fold['time'])}  {fold['seq']}  {fold['model']}{_cut(fold)}{_left_out(fold)}{_warned(fold)}"
    )


def _cut(fold: Mapping[str, Any]) -> str:
    """What was cut off a fold when it came and by now, where it was anything."""
    if not fold.get("cut") and not fold.get("cut_now"):
        return ""
    now = "" if fold["cut_now"] is None else f", {share(fold['cut_now'])} by now"
    return f" (cut {share(fold['cut'] or 0.0)} when it came{now})"


def _left_out(fold: Mapping[str, Any]) -> str:
    """What a fold left out. A daemon of an earlier version does not say it."""
    out = fold.get("left_out")
    return f" (left out: {out})" if out else ""


def _warned(fold: Mapping[str, Any]) -> str:
    """What gates found that only warn."""
    return f" (warned: {fold['warned']})" if fold.get("warned") else ""


def _view(view: Mapping[str, Any]) -> str:
    """A view, what it reads, and what of it is out."""
    out = []
    if view["current"]:
        since = f"record {view['current_seq']}, {when(view['current_time'])}" if view["current_time"] else "not out yet"
        out.append(f"{view['current']}: {since}")
    if view["repo"]:
        released = "not out yet" if view["released_seq"] is None else f"record {view['released_seq']}"
        out.append(f"{view['repo']}: {released}")
    form = f", {view['form']}" if view.get("form") else ""
    reads = view["problem"] or f"reads {view['count']} by {view['rule']} ({view['models']}){form}"
    return f"view       {view['name']}: {'; '.join([reads, *out])}"


def _canary(found: Mapping[str, Any]) -> str:
    """A canary, and what was seen of it."""
    seen = f"{found['measurements']} measurements, {found['failed']} of the last {found['kept']} alarms"
    since = f" since {when(found['since'])}" if found["since"] else ""
    said = f"; {found['said']}" if found["said"] else ""
    where = f" at {', '.join(found['places'])}" if found["places"] else ""
    of = f"view {found['view']}, " if found["view"] else ""
    return f"canary     {of}record {found['seq']}, {found['phase']}{since}{where}: {seen}{said}"


def _sources(body: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the sources that run say of themselves (`SourceReport`), by the name of their kind."""
    return {key: told for key, told in body.items() if isinstance(told, dict) and {"bases", "polled"} <= told.keys()}


def _title(name: str, told: Mapping[str, Any]) -> str:
    """How people call a kind of source. A daemon of an earlier version does not say it."""
    return str(told.get("title") or name)


def _source(name: str, told: Mapping[str, Any]) -> str:
    """What a source says of itself."""
    asked = f"last asked {when(told['polled'])}" if told["polled"] else "not asked yet"
    problem = f"; {told['problem']}" if told["problem"] else ""
    return f"{name:<10} {', '.join(told['bases']) or 'pushes only'}; {asked}, {told['seen']} open{problem}"
