"""What operators load: alert rules (with promtool where it is installed), the dashboard, the unit; and that they speak
of series that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from continual import making
from continual.engine.outcomes import FoldReport
from continual.executors.cluster_figures import NodeSeen, RayFigures
from continual.records import Candidate, Lineage, Totals
from continual.service import gauging, series
from continual.service.metrics import Metrics
from continual.service.series import TABLE
from continual.state.parts import FoldNumbers, NoteSummary
from tests.campaigns import dashboard
from tests.helpers import models, prometheus, services
from tests.helpers.entries import select

OPS = Path(__file__).parents[2] / "ops"
SUFFIX = re.compile(r"_(bucket|count|sum)$")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def filled() -> Metrics:
    metrics = Metrics()
    candidate = Candidate("k", "n", "folder", "/o", "full", 1)
    numbers = FoldNumbers(tau_norm=1.0, notes={"kept": NoteSummary(0.8, 0.9, 1.0, 3)})
    metrics.observe(
        FoldReport(candidate, "d", Lineage(()), Totals(), numbers, {"read": 1.0, "total": 2.0}, 10, "cpu"), now=5.0
    )
    metrics.refused("shape")
    metrics.retried()
    metrics.error("halt")
    metrics.queue(3)
    metrics.state(1, 2, 3, 4)
    metrics.gauges({"lambda": 1.5})
    metrics.scale(0.25, 7)
    metrics.full(0.75, 0.125)
    metrics.round(4.0, 2, now=6.0)
    metrics.pool(9, replace(select(), gap=0.5, loss=1.5, before=2.5))
    metrics.released(11)
    metrics.hook("http", ok=True)
    figures = RayFigures(lambda: 12.0)
    figures.answered("10.0.0.7:6379", {"10.0.0.7": NodeSeen(alive=True), "10.0.0.8": NodeSeen(alive=True)})
    with figures.driving(4) as driven:
        for first, machine in (("a", "10.0.0.7"), ("b", "10.0.0.7"), ("c", "10.0.0.8"), ("d", "")):
            driven.sent(first, 1)
            if machine:
                driven.came(first, machine, 14, 0.5)
        driven.was_lost("d")
        driven.sent("d", 1)
        driven.failed("d")
        driven.sent("d", 1)
        figures.avoided.avoid("10.0.0.7:6379", "10.0.0.8", ["id"], "its disk is full")
        for _ in range(2):  # it is looked at again and again
            gauging.cluster(figures.seen("10.0.0.7:6379"), metrics)
    metrics.published(8)
    metrics.notified(ok=True)
    metrics.under_way(0.5)
    metrics.room(20, 10)
    metrics.stored({"generations": 30, "ledger": 4, "other": 1})
    metrics.device(used=6, free=7, reserved=5)
    metrics.resources(workers=2, memory=100)
    metrics.paused(paused=False)
    metrics.degraded({"disk"})
    metrics.uses(*series.FEATURES)
    metrics.canaries(2)
    metrics.canary_measured("inconclusive")
    metrics.canary_ended("failed")
    for requests, received, polled in ((5, 60, 1.0), (7, 90, 2.0)):
        metrics.source(
            {
                "continual_hub_requests_total": requests,
                "continual_hub_received_bytes_total": received,
                "continual_hub_last_poll_timestamp_seconds": polled,
            }
        )
    metrics.build(rule="opcm", device="cpu", software={"continual": "0", "torch": "2"})
    return metrics


def test_every_series_says_what_was_observed() -> None:
    text = filled().text().decode()
    for line in (
        "continual_folds_total 3.0",
        "continual_releases_total 1.0",
        "continual_released_bytes_total 11.0",
        'continual_hooks_total{kind="http",result="ok"} 1.0',
        "continual_canaries 2.0",
        'continual_canary_measurements_total{verdict="inconclusive"} 1.0',
        'continual_canary_verdicts_total{verdict="failed"} 1.0',
        "continual_hub_requests_total 7.0",
        "continual_hub_received_bytes_total 90.0",
        "continual_hub_last_poll_timestamp_seconds 2.0",
        'continual_refusals_total{reason="shape"} 1.0',
        "continual_read_bytes_total 10.0",
        'continual_fold_stage_seconds_total{stage="read"} 1.0',
        "continual_fold_seconds_sum 2.0",
        "continual_queue_candidates 3.0",
        "continual_last_fold_timestamp_seconds 6.0",
        "continual_lambda_ratio 1.5",
        "continual_scale_ratio 0.25",
        "continual_width_used_ratio 0.75",
        "continual_cut_ratio 0.125",
        "continual_scale_tuned_folds 7.0",
        "continual_energy_kept_ratio 0.9",
        "continual_state_head 3.0",
        "continual_rounds_total 1.0",
        "continual_round_seconds_sum 4.0",
        "continual_pool_candidates 9.0",
        "continual_round_gap 0.5",
        "continual_round_loss 1.5",
        "continual_round_loss_before 2.5",
        "continual_last_round_timestamp_seconds 6.0",
        "continual_under_way_ratio 0.5",
        'continual_stored_bytes{what="ledger"} 4.0',
        "continual_device_reserved_bytes 5.0",
        "continual_memory_limit_bytes 100.0",
        "continual_ray_nodes 2.0",
        "continual_ray_answered_timestamp_seconds 12.0",
        "continual_ray_orders_out 1.0",
        "continual_ray_orders_total 3.0",
        'continual_ray_node_orders_total{node="10.0.0.7"} 2.0',
        'continual_ray_node_seconds_total{node="10.0.0.8"} 0.5',
        'continual_ray_node_read_bytes_total{node="10.0.0.7"} 28.0',
        'continual_ray_node_orders_total{node="other"} 0.0',
        "continual_ray_lost_total 1.0",
        "continual_ray_failed_total 1.0",
        "continual_ray_avoided_nodes 1.0",
        "continual_ray_seconds_total 1.5",
        "continual_ray_read_bytes_total 42.0",
        'continual_degraded{reason="disk"} 1.0',
    ):
        assert line in text
    assert 'stage="total"' not in text
    peak = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("continual_peak_memory_bytes "))
    assert peak > 10e6


@needs_promtool
def test_promtool_accepts_the_metrics() -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=filled().text(), capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("check", "config", "prometheus.yml")],
)
def test_promtool_accepts_the_rules(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=OPS / "prometheus", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_a_real_prometheus_scrapes_a_running_daemon(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    models.fine_tune(base, tmp_path / "in/alice", 1)
    with services.daemon(tmp_path / "state", tmp_path / "in") as process:
        address = services.url(process, tmp_path / "state")
        services.until(lambda: services.status(address)["folds"] == 1, "the fold")
        shutil.copy(OPS / "prometheus/alerts.yml", tmp_path)
        config = (OPS / "prometheus/prometheus.yml").read_text()
        (tmp_path / "prometheus.yml").write_text(
            config.replace("127.0.0.1:8321", address.removeprefix("http://")).replace("15s", "1s")
        )
        with prometheus.started(tmp_path) as where:

            def value(query: str) -> str | None:
                found = prometheus.ask(where, query)
                return str(found[0]["value"][1]) if found else None

            services.until(lambda: value("continual_folds_total") == "1", "Prometheus knows of the fold")
            services.until(lambda: value("rate(continual_folds_total[1h])"), "it has asked twice")
            services.until(lambda: value("continual_stored_bytes"), "the files were looked at")
            assert value("up") == "1"
            rules = json.loads(services.get(f"{where}/api/v1/rules")[1])["data"]["groups"][0]["rules"]
            assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
            silent = [silent for panel in dashboard.panels() for silent in dashboard.silent(where, panel)]
    # what is neither there nor says which feature it needs
    assert [(panel.title, query.expr) for panel, query in silent if not query.needs and not panel.quiet] == []
    assert len(silent) < len(list(dashboard.panels())), "some have data"


def test_every_series_of_the_table_can_be_had() -> None:
    text = filled().text().decode()
    had = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE continual_")}
    assert had == {row.name for row in TABLE}
    assert {row.there for row in TABLE} == set(series.FEATURES)


def test_what_is_not_used_has_no_series_and_no_counter_says_when_it_was_made() -> None:
    text = Metrics().text().decode()
    had = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE continual_")}
    assert had == {row.name for row in TABLE if row.there == "always" and row.kind != "gauge"} | {
        "continual_peak_memory_bytes"
    }
    assert "_created" not in filled().text().decode()
    metrics = Metrics()
    metrics.hooks(["http"])
    assert b'continual_hooks_total{kind="http",result="failed"} 0.0' in metrics.text()
    assert b'kind="command"' not in metrics.text()
    metrics.scale(0.5, 3)
    metrics.scale(None, None)
    assert b"continual_scale_ratio 0.5" in metrics.text(), "the last one that was known"
    assert b"continual_scale_tuned_folds" not in metrics.text()
    metrics.scale(None, 4)
    assert b"continual_scale_tuned_folds 4.0" in metrics.text()


def test_words_of_strangers_make_no_new_labels() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.refused(f"reason-{number}")
        metrics.error(f"kind-{number}")
        metrics.hook(f"kind-{number}", ok=True)
    text = metrics.text().decode()
    assert 'continual_refusals_total{reason="other"} 1000.0' in text
    assert 'continual_hooks_total{kind="other",result="ok"} 1000.0' in text
    assert len(text.splitlines()) < 250


def test_alerts_and_dashboard_speak_of_series_that_exist() -> None:
    known = {row.name for row in TABLE}
    texts = [(OPS / "prometheus/alerts.yml").read_text(), (OPS / "grafana/continual.json").read_text()]
    used = {SUFFIX.sub("", name) for text in texts for name in re.findall(r"\bcontinual_\w+", text)}
    assert used <= known
    assert known - used == set(), "series that no alert and no panel shows"


def test_the_dashboard_is_the_one_that_the_code_makes() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    assert (OPS / "grafana/continual.json").read_text() == dashboard.built(), "python -m tests.campaigns.dashboard"


def test_dashboard_panels_do_not_overlap() -> None:
    panels = json.loads((OPS / "grafana/continual.json").read_text())["panels"]
    cells = [
        (x, y)
        for p in panels
        for g in [p["gridPos"]]
        for x in range(g["x"], g["x"] + g["w"])
        for y in range(g["y"], g["y"] + g["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({p["id"] for p in panels}) == len(panels)


def test_the_page_has_the_table_of_the_code_and_no_series_besides() -> None:
    page = (OPS / "docs/operations.md").read_text()
    assert series.markdown() in page
    known = {row.name for row in TABLE}
    for file in (OPS / "docs").glob("*.md"):
        named = {SUFFIX.sub("", name) for name in re.findall(r"\bcontinual_[a-z_]+", file.read_text())}
        assert named <= known, file.name


def alerts() -> dict[str, str]:
    """The rule of every alert by its name, as it stands in the file."""
    rules = (OPS / "prometheus/alerts.yml").read_text().split("- alert: ")[1:]
    return {rule.split()[0]: rule for rule in rules}


def test_every_alert_has_a_section_in_the_page_and_names_it() -> None:
    page = (OPS / "docs/alerts.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n\n\*(page|ticket): ", page, re.MULTILINE))
    assert list(sections) == list(alerts())
    for name, rule in alerts().items():
        assert f"runbook: ops/docs/alerts.md#{name.lower()}\n" in rule
        assert f"severity: {sections[name]}}}" in rule


def test_every_alert_fires_in_the_tests_of_the_rules() -> None:
    tests = (OPS / "prometheus/alerts_test.yml").read_text()
    fires = set(re.findall(r"alertname: (\w+)\n +exp_alerts:\n", tests))
    assert fires == set(alerts())


def test_the_gate_says_how_it_is_called() -> None:
    def check(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([OPS / "check", *arguments], capture_output=True, text=True, check=False)

    told = check("--help")
    assert told.returncode == 0
    page = (OPS / "docs/contributing.md").read_text()
    for form in ("ops/check ", "ops/check --fast", "ops/check --help"):
        assert f"\n{form}" in f"\n{told.stdout}"
        assert form in page or form.endswith("--help")
    assert check("--fast", "tests/unit").returncode == 2
