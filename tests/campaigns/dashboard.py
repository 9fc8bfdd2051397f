"""Writes the dashboard, ops/grafana/continual.json: `python -m tests.campaigns.dashboard`. A test says when it is to be
written again. Which feature a panel needs is taken from the table of the series."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from continual.service.series import BY_NAME, FEATURES
from tests.helpers.prometheus import ask

FILE = Path(__file__).parents[2] / "ops/grafana/continual.json"
HERE = '{instance=~"$instance"}'
"""What every series is asked with: the daemons that are chosen above the panels."""
_NAME = re.compile(r"\bcontinual_\w+")
_PARTS = re.compile(r"_(bucket|count|sum)$")


class Query(NamedTuple):
    """A query, with `@` where the chosen daemons stand, and its legend."""

    expr: str
    legend: str = "{{instance}}"

    @property
    def written(self) -> str:
        """As Grafana has it."""
        return self.expr.replace("@", HERE)

    @property
    def needs(self) -> list[str]:
        """The words of `FEATURES` for what has to be in use for it to have data, besides what is always there."""
        found = [BY_NAME[_PARTS.sub("", name)].there for name in _NAME.findall(self.expr)]
        return [word for word in dict.fromkeys(found) if word != "always"]


class Panel(NamedTuple):
    """A panel: its title, unit, queries, and how it is drawn: `stat`, `timeseries` or `table`. `wrong`: from which
    value on it is shown in red. `quiet`: no data is good news there."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    form: str = "timeseries"
    wrong: float | None = None
    quiet: bool = False

    @property
    def description(self) -> str:
        """When it has data, where that is not always."""
        words = dict.fromkeys(word for query in self.queries for word in query.needs)
        told = "; ".join(FEATURES[word].replace("`", "") for word in words)
        return f"There is something to see {told}." if told else "Empty: all is well." if self.quiet else ""


def _one(title: str, unit: str, expr: str, legend: str = "{{instance}}", form: str = "timeseries") -> Panel:
    return Panel(title, unit, (Query(expr, legend),), form)


ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        _one("Folds in force", "short", "continual_state_folds@", form="stat"),
        _one("Since the last fold", "s", "time() - continual_last_fold_timestamp_seconds@", form="stat"),
        Panel("Waiting", "short", (Query("continual_queue_candidates@"),), "stat", wrong=100),
        _one("Done of what is under way", "percentunit", "continual_under_way_ratio@", form="stat"),
        Panel("Paused", "short", (Query("continual_paused@"),), "stat", wrong=1),
        Panel(
            "Degraded",
            "short",
            (Query("max by (instance, reason) (continual_degraded@) > 0", "{{instance}} {{reason}}"),),
            wrong=1,
            quiet=True,
        ),
        Panel(
            "Retries and errors per hour",
            "short",
            (
                Query("rate(continual_retries_total@[1h]) * 3600", "{{instance}} retries"),
                Query("rate(continual_errors_total@[1h]) * 3600", "{{instance}} {{kind}}"),
            ),
        ),
        _one("Build", "short", "continual_build_info@", form="table"),
    ),
    "Folds": (
        _one("Folds per hour", "short", "rate(continual_folds_total@[1h]) * 3600"),
        _one(
            "Refusals per hour",
            "short",
            "sum by (instance, reason) (rate(continual_refusals_total@[1h])) * 3600 > 0",
            "{{instance}} {{reason}}",
        )._replace(quiet=True),
        _one(
            "Fold time, 95 %",
            "s",
            "histogram_quantile(0.95, sum by (instance, le) (rate(continual_fold_seconds_bucket@[1h])))",
        ),
        _one(
            "Where fold time goes",
            "s",
            "sum by (instance, stage) (rate(continual_fold_stage_seconds_total@[1h]))",
            "{{instance}} {{stage}}",
        ),
        _one("Read", "Bps", "rate(continual_read_bytes_total@[5m])"),
        _one("Newest record", "short", "continual_state_head@"),
    ),
    "The merge": (
        _one("Scale", "short", "continual_scale_ratio@"),
        _one("Folds since the scale was tuned", "short", "continual_state_folds@ - continual_scale_tuned_folds@"),
        _one("Lambda", "short", "continual_lambda_ratio@"),
        _one("Energy kept", "percentunit", "continual_energy_kept_ratio@"),
        Panel(
            "Width used and cut off, of adapters",
            "percentunit",
            (
                Query("continual_width_used_ratio@", "{{instance}} width used"),
                Query("continual_cut_ratio@", "{{instance}} cut off"),
            ),
        ),
    ),
    "The box": (
        Panel(
            "Room on the disk",
            "bytes",
            (
                Query("continual_disk_free_bytes@", "{{instance}} free"),
                Query("continual_fold_needs_bytes@", "{{instance}} the next fold needs"),
            ),
        ),
        _one("What the state takes", "bytes", "continual_stored_bytes@", "{{instance}} {{what}}"),
        Panel(
            "Generations",
            "bytes",
            (
                Query("continual_state_bytes@", "{{instance}} one generation"),
                Query(
                    "continual_state_bytes@ * continual_state_generations@", "{{instance}} all, if none shares a file"
                ),
            ),
        ),
        Panel(
            "Memory",
            "bytes",
            (
                Query(
                    "process_resident_memory_bytes@ and on (instance) continual_build_info@", "{{instance}} resident"
                ),
                Query("continual_peak_memory_bytes@", "{{instance}} at its peak"),
                Query("continual_memory_limit_bytes@", "{{instance}} tensors in flight, at most"),
            ),
        ),
        _one("Workers", "short", "continual_workers@"),
        Panel(
            "Memory of the device",
            "bytes",
            (
                Query("continual_device_used_bytes@", "{{instance}} used"),
                Query("continual_device_free_bytes@", "{{instance}} free"),
                Query("continual_device_reserved_bytes@", "{{instance}} reserved by continual"),
            ),
        ),
        _one(
            "Connections not answered as asked, per hour",
            "short",
            "sum by (instance, reason) (rate(continual_http_dropped_total@[1h])) * 3600",
            "{{instance}} {{reason}}",
        ),
    ),
    "The cluster": (
        Panel(
            "Machines alive, and orders out",
            "short",
            (
                Query("continual_ray_nodes@", "{{instance}} machines"),
                Query("continual_ray_orders_out@", "{{instance}} orders out"),
                Query("continual_ray_avoided_nodes@", "{{instance}} machines that are avoided"),
            ),
        ),
        Panel(
            "Orders on the cluster, per minute",
            "short",
            (
                Query("rate(continual_ray_orders_total@[5m]) * 60", "{{instance}} done"),
                Query("rate(continual_ray_lost_total@[5m]) * 60", "{{instance}} lost and sent out again"),
                Query("rate(continual_ray_failed_total@[5m]) * 60", "{{instance}} sent to another machine"),
            ),
        ),
        _one("Since the cluster last answered", "s", "time() - continual_ray_answered_timestamp_seconds@", form="stat"),
        _one(
            "Orders by machine, per minute",
            "short",
            "sum by (instance, node) (rate(continual_ray_node_orders_total@[5m])) * 60",
            "{{instance}} {{node}}",
        ),
        Panel(
            "Orders at work, on average",
            "short",
            (
                Query("rate(continual_ray_seconds_total@[5m])", "{{instance}} all"),
                Query("sum by (instance, node) (rate(continual_ray_node_seconds_total@[5m]))", "{{instance}} {{node}}"),
            ),
        ),
        Panel(
            "Read by the cluster",
            "Bps",
            (
                Query("rate(continual_ray_read_bytes_total@[5m])", "{{instance}} all"),
                Query(
                    "sum by (instance, node) (rate(continual_ray_node_read_bytes_total@[5m]))", "{{instance}} {{node}}"
                ),
            ),
        ),
    ),
    "Rounds over the pool": (
        _one("Waiting in the pool", "short", "continual_pool_candidates@"),
        _one("Since the last round", "s", "time() - continual_last_round_timestamp_seconds@", form="stat"),
        _one("Rounds per hour", "short", "rate(continual_rounds_total@[1h]) * 3600"),
        _one(
            "Round time, 95 %",
            "s",
            "histogram_quantile(0.95, sum by (instance, le) (rate(continual_round_seconds_bucket@[1d])))",
        ),
        Panel(
            "Loss before and after the last round",
            "short",
            (
                Query("continual_round_loss_before@", "{{instance}} before"),
                Query("continual_round_loss@", "{{instance}} after"),
            ),
        ),
        _one("Duality gap", "short", "continual_round_gap@"),
    ),
    "What goes out": (
        _one("Record that the link current has", "short", "continual_published_seq@"),
        _one("Releases per hour", "short", "rate(continual_releases_total@[1h]) * 3600"),
        _one("Uploaded", "Bps", "rate(continual_released_bytes_total@[5m])"),
        _one(
            "Hooks per hour",
            "short",
            "sum by (instance, kind, result) (rate(continual_hooks_total@[1h])) * 3600",
            "{{instance}} {{kind}} {{result}}",
        ),
        Panel(
            "Canaries, and looks at them per hour",
            "short",
            (
                Query("continual_canaries@", "{{instance}} canaries"),
                Query(
                    "sum by (instance, verdict) (rate(continual_canary_measurements_total@[1h])) * 3600",
                    "{{instance}} {{verdict}}",
                ),
                Query(
                    "sum by (instance, verdict) (increase(continual_canary_verdicts_total@[1h]))",
                    "{{instance}} {{verdict}} in an hour",
                ),
            ),
        ),
    ),
    "Messages to people": (
        _one(
            "Messages per hour",
            "short",
            "sum by (instance, result) (rate(continual_notifications_total@[1h])) * 3600",
            "{{instance}} {{result}}",
        ),
    ),
    "The Hub": (
        _one("Since the Hub last answered", "s", "time() - continual_hub_last_poll_timestamp_seconds@", form="stat"),
        _one("Requests to the Hub", "reqps", "rate(continual_hub_requests_total@[5m])"),
        _one("Received from the Hub", "Bps", "rate(continual_hub_received_bytes_total@[5m])"),
    ),
}


def panels() -> Iterator[Panel]:
    """Every panel, in order."""
    for row in ROWS.values():
        yield from row


def silent(url: str, panel: Panel) -> list[tuple[Panel, Query]]:
    """The queries of a panel for which the Prometheus at `url` has no data."""
    asked = [(panel, query) for query in panel.queries]
    return [(panel, query) for panel, query in asked if not ask(url, query.expr.replace("@", ""))]


def built() -> str:
    """The dashboard as the file has it: JSON, and a line feed."""
    from grafana_foundation_sdk.builders import dashboard as boards
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import VariableRefresh

    board = (
        boards.Dashboard("continual")
        .uid("continual")
        .description("Written by python -m tests.campaigns.dashboard.")
        .tags(["continual"])
        .refresh("30s")
        .time("now-24h", "now")
        .timezone("utc")
        .with_variable(boards.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(
            boards.QueryVariable("instance")
            .label("Daemon")
            .datasource(_source())
            .query("label_values(continual_build_info, instance)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    number = 0
    for title, row in ROWS.items():
        number += 1
        board = board.with_row(boards.Row(title).id(number))
        for panel in row:
            number += 1
            board = board.with_panel(_drawn(panel, number))
    made = json.loads(JSONEncoder().encode(board.build()))
    for panel in made["panels"]:
        if panel.get("options", ...) is None:  # Grafana has its own, but not in place of a null
            del panel["options"]
    return json.dumps(made, indent=1, sort_keys=True) + "\n"


def _source() -> object:
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    return DataSourceRef(type_val="prometheus", uid="${source}")


def _drawn(panel: Panel, number: int) -> object:
    from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
    from grafana_foundation_sdk.models.dashboard import Threshold, ThresholdsMode

    one = {"stat": stat.Panel, "timeseries": timeseries.Panel, "table": table.Panel}[panel.form]()
    steps = [Threshold(value=None, color="green")]
    if panel.wrong is not None:
        steps.append(Threshold(value=panel.wrong, color="red"))
    one = (
        one.id(number)
        .title(panel.title)
        .datasource(_source())
        .unit(panel.unit)
        .span(8)
        .height(7 if panel.form != "stat" else 4)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    )
    if panel.description:
        one = one.description(panel.description)
    for letter, query in zip("ABCDEF", panel.queries, strict=False):
        asked = prometheus.Dataquery().ref_id(letter).expr(query.written).legend_format(query.legend)
        if panel.form == "table":
            asked = asked.instant().format("table")
        one = one.with_target(asked)
    return one


if __name__ == "__main__":
    FILE.write_text(built())
    print(f"{FILE.name}: {sum(1 for _ in panels())} panels")
