"""What `continual status` prints for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from continual.texts import duration, scale, size, when


def text(body: Mapping[str, Any]) -> str:
    """A status for people."""
    lines = [
        f"{body['health']}{': ' + body['why'] if body['why'] else ''}"
        + (f", process {body['pid']} at {body['url']}" if body["pid"] else ""),
        f"state      {body['state']}, record {body['head']}, {body['folds']} folded, {size(body['state_bytes'])} a generation, {body['generations']} kept",
        f"base       {body['base']}",
        f"rule       {body['rule']} {body['options'] or ''}, scale {scale(body['scale'], body.get('tuned'))}"
        + "".join(f", {k} {v:.4g}" for k, v in body["gauges"].items()),
    ]
    if body["uptime_seconds"] is not None:
        watched = ", ".join([*body["watch"], *(["the Hub"] if body["hub"] else [])]) or "nothing"
        lines.append(
            f"up         {duration(body['uptime_seconds'])}, peak memory {size(body['peak_memory_bytes'])}, watching {watched}"
        )
    if body["current"]:
        lines.append(
            f"folding    {body['current']['model']}: {body['current']['stage']} {body['current']['done']}/{body['current']['total']}"
        )
    more = body["queued"] - len(body["queue"])
    lines.append(f"waiting    {', '.join(body['queue']) or 'nothing'}{f' and {more} more' if more else ''}")
    if body["hub"]:
        hub = body["hub"]
        asked = f"last asked {when(hub['polled'])}" if hub["polled"] else "not asked yet"
        lines.append(
            f"hub        {', '.join(hub['bases']) or 'pushes only'}; {asked}, {hub['seen']} open"
            + (f"; {hub['problem']}" if hub["problem"] else "")
        )
    if body["select"] != "none":
        last = body["last_round"]
        told = (
            f"; last round {when(last['time'])}: record {last['seq']}, loss {last['before']:.4g} to {last['loss']:.4g}, gap {last['gap']:.3g}"
            if last
            else "; no round yet"
        )
        lines.append(f"pool       {body['pool_size']} wait for a round ({body['select']}){told}")
    lines += [f"folded     {when(f['time'])}  {f['seq']}  {f['model']}" for f in body["last_folds"][:5]]
    lines += [f"published  {when(p['time'])}  {p['seq']}  {p['message']}" for p in body["published"][:3]]
    lines += [f"refused    {when(r['time'])}  {r['seq']}  {r['model']}: {r['reason']}" for r in body["refusals"][:5]]
    return "\n".join(lines)
