"""The table of every series that the daemon exposes: what the page about it, the dashboard and the alerts go by.

No label is a model's name or any other text of strangers: the values of each are known here, or (machines of a cluster)
bounded in number, and what is none of them is counted as `other`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from continual.errors import REFUSALS
from continual.gates import GATES
from continual.service.health import REASONS
from continual.state import usage

Kind = Literal["counter", "gauge", "histogram"]
FEATURES = {
    "always": "always",
    "fold": "once a model was folded",
    "disk": "of a state on a disk, not on an object store",
    "folding": "while a fold or a round is under way",
    "opcm": "where the rule of the state has a λ",
    "projection": "once this process folded by a rule that projects",
    "adapters": "of a state of adapters",
    "scale": "where the scale is known: from the first export on, or by `continual scale`",
    "tuned": "while a scale that `continual tune` chose is in force",
    "device": "where tensors are computed on an accelerator",
    "local": "where tensors are folded in this process",
    "ray": 'with `executor = "ray"`',
    "cluster": 'with `executor = "ray"`, once there was work for the cluster',
    "rounds": "with `select`",
    "round": "once a round has ended",
    "hub": "with `hub.watch`",
    "polled": "once the Hub was polled with success",
    "publish": "with `current`",
    "release": "with `release.repo` or the `repo` of a view",
    "hooks": "with `[[hooks]]`",
    "canary": "with the `canary` of a release or a view",
    "notify": "with `[notify]`",
}
"""When a series is there, by the word in `Series.there`."""
ERRORS = ("halt", "internal", "source", "publish", "release", "hook", "canary", "page", "notify")
"""The kinds of errors: a halt; an exception that nobody expected; a source, a publication, a hook, the watch over a
canary or a message that failed; a page that could not be shown."""
DROPPED = ("full", "slow", "host", "malformed")
"""Why the service does not answer a connection as it was asked."""
STAGES = ("read", "rule", "write", "commit")
HOOKS = ("sglang", "sglang-lora", "vllm", "vllm-lora", "http", "command")
OTHER = "other"
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_REFUSALS = tuple(dict.fromkeys((*REFUSALS, *(reason for gate in GATES for reason in gate.reasons))))
_RESULTS = ("ok", "failed")
_NODE: tuple[tuple[str, tuple[str, ...]], ...] = (("node", ()),)
"""The address of a machine: of the first 64 (`cluster_figures.LABELS`), and `other` of all that come later."""


class Series(NamedTuple):
    """A row of the table. `labels`: each with the values that it may have; none where the daemon gives it one for good,
    or the cluster. `there`: a word of `FEATURES`."""

    kind: Kind
    name: str
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    there: str = "always"


TABLE: tuple[Series, ...] = (
    Series("counter", "continual_folds_total", "Fine-tunes folded by this process."),
    Series(
        "counter",
        "continual_refusals_total",
        "Candidates kept out by this process, duplicates included.",
        (("reason", _REFUSALS),),
    ),
    Series(
        "counter", "continual_retries_total", "Times a candidate was put back because the environment got in the way."
    ),
    Series("counter", "continual_errors_total", "Things that went wrong outside any candidate.", (("kind", ERRORS),)),
    Series(
        "gauge",
        "continual_degraded",
        "1 for each reason for which the daemon is degraded, 0 for the others.",
        (("reason", REASONS),),
    ),
    Series("gauge", "continual_paused", "1 while folding is paused by 'continual pause', else 0."),
    Series("gauge", "continual_queue_candidates", "Candidates waiting."),
    Series(
        "gauge",
        "continual_last_fold_timestamp_seconds",
        "When a model was last folded, as seconds since 1970; from the ledger.",
        there="fold",
    ),
    Series("histogram", "continual_fold_seconds", "Wall time of a fold from headers to acknowledged commit."),
    Series(
        "counter",
        "continual_fold_stage_seconds_total",
        "Seconds spent in folds by stage, summed over workers.",
        (("stage", STAGES),),
    ),
    Series(
        "gauge",
        "continual_under_way_ratio",
        "How much is done of the fold or the round under way, of the part that it is in.",
        there="folding",
    ),
    Series("counter", "continual_read_bytes_total", "Bytes read from bases and fine-tunes."),
    Series("gauge", "continual_state_bytes", "Bytes of the accumulators in one generation."),
    Series("gauge", "continual_state_generations", "Generations kept on disk."),
    Series("gauge", "continual_state_head", "Number of the newest record."),
    Series("gauge", "continual_state_folds", "Folds in force."),
    Series(
        "gauge",
        "continual_stored_bytes",
        "Bytes that the files of the state take on its disk; looked at every minute.",
        (("what", usage.KINDS),),
    ),
    Series("gauge", "continual_disk_free_bytes", "Bytes that are free on the disk of the state.", there="disk"),
    Series(
        "gauge", "continual_fold_needs_bytes", "Bytes that the next fold needs on the disk of the state.", there="disk"
    ),
    Series(
        "gauge",
        "continual_lambda_ratio",
        "The scaling factor of OPCM: norm of the merged direction over the mean task-vector norm.",
        there="opcm",
    ),
    Series(
        "gauge",
        "continual_energy_kept_ratio",
        "Share of the last task vector's energy that its projection kept, mean over matrices.",
        there="projection",
    ),
    Series(
        "gauge",
        "continual_width_used_ratio",
        "Singular triplets of the fullest layer over the width; looked at every 5 seconds.",
        there="adapters",
    ),
    Series(
        "gauge",
        "continual_cut_ratio",
        "Share of the sum of all squared task-vector norms that was cut off by now.",
        there="adapters",
    ),
    Series(
        "gauge",
        "continual_scale_ratio",
        "What the rule's own result (its matrices, under spread) is multiplied by when it is read; the last one known.",
        there="scale",
    ),
    Series(
        "gauge",
        "continual_scale_tuned_folds",
        "Folds in force when the scale was tuned: far below continual_state_folds, tune again.",
        there="tuned",
    ),
    Series("gauge", "continual_workers", "Tensors that are folded at a time at most.", there="local"),
    Series("gauge", "continual_memory_limit_bytes", "Bytes that the tensors in flight may take.", there="local"),
    Series(
        "gauge",
        "continual_ray_nodes",
        "Machines of the cluster that were alive when it last answered; 0 while it is not connected any more.",
        there="cluster",
    ),
    Series(
        "gauge",
        "continual_ray_answered_timestamp_seconds",
        "When the cluster last said which machines it has, as seconds since 1970; every 5 s from the first work on.",
        there="cluster",
    ),
    Series("gauge", "continual_ray_orders_out", "Orders that are out now.", there="ray"),
    Series("counter", "continual_ray_orders_total", "Orders that machines did for this process.", there="ray"),
    Series(
        "counter",
        "continual_ray_lost_total",
        "Orders that were lost with a worker, and sent out again.",
        there="ray",
    ),
    Series(
        "counter",
        "continual_ray_failed_total",
        "Orders that a machine could not do, and another was asked.",
        there="ray",
    ),
    Series("gauge", "continual_ray_avoided_nodes", "Machines that are given no orders for a while.", there="ray"),
    Series("counter", "continual_ray_seconds_total", "Seconds that the orders took, added up.", there="ray"),
    Series("counter", "continual_ray_read_bytes_total", "Bytes that the orders read.", there="ray"),
    Series("counter", "continual_ray_node_orders_total", "The same orders by machine.", _NODE, there="ray"),
    Series("counter", "continual_ray_node_seconds_total", "Their seconds by machine.", _NODE, there="ray"),
    Series("counter", "continual_ray_node_read_bytes_total", "Their bytes by machine.", _NODE, there="ray"),
    Series("gauge", "continual_peak_memory_bytes", "Largest resident set of the process so far (VmHWM)."),
    Series(
        "gauge",
        "continual_device_used_bytes",
        "Bytes of the device's memory that are taken, by any process.",
        there="device",
    ),
    Series("gauge", "continual_device_free_bytes", "Bytes of the device's memory that are free.", there="device"),
    Series(
        "gauge",
        "continual_device_reserved_bytes",
        "Bytes of the device's memory that this process has reserved for tensors.",
        there="device",
    ),
    Series("counter", "continual_rounds_total", "Rounds over the pool that this process ended.", there="rounds"),
    Series(
        "histogram",
        "continual_round_seconds",
        "Wall time of a round, from loading the model to its record and the folds it led to.",
        there="rounds",
    ),
    Series(
        "gauge",
        "continual_pool_candidates",
        "Candidates in the pool; those that a round has judged and deferred stay, so it need not reach 0.",
        there="rounds",
    ),
    Series(
        "gauge",
        "continual_last_round_timestamp_seconds",
        "When a round last ended, as seconds since 1970; from the ledger.",
        there="round",
    ),
    Series(
        "gauge",
        "continual_round_gap",
        "Duality gap at the end of the last round, in units of the loss, over who is in or was let in.",
        there="round",
    ),
    Series(
        "gauge",
        "continual_round_loss",
        "Loss on the driving calibration rows at the end of the last round, of the weighted sum that it chose.",
        there="round",
    ),
    Series("gauge", "continual_round_loss_before", "The same loss at its beginning.", there="round"),
    Series(
        "gauge",
        "continual_published_seq",
        "Number of the record that the link current has.",
        there="publish",
    ),
    Series("counter", "continual_releases_total", "Releases on the Hub that this process made.", there="release"),
    Series("counter", "continual_released_bytes_total", "Bytes of files that were uploaded for them.", there="release"),
    Series(
        "counter",
        "continual_hooks_total",
        "Servers that were told of a publication, of the kinds that are set.",
        (("kind", HOOKS), ("result", _RESULTS)),
        there="hooks",
    ),
    Series("gauge", "continual_canaries", "Canaries that are not promoted or taken back yet.", there="canary"),
    Series(
        "counter",
        "continual_canary_measurements_total",
        "Looks at canaries, by what they said.",
        (("verdict", ("passed", "failed", "inconclusive")),),
        there="canary",
    ),
    Series(
        "counter",
        "continual_canary_verdicts_total",
        "Canaries that were promoted or taken back.",
        (("verdict", ("promoted", "failed")),),
        there="canary",
    ),
    Series(
        "counter",
        "continual_hub_requests_total",
        "Requests this process made to the Hub to look and to read.",
        there="hub",
    ),
    Series(
        "counter",
        "continual_hub_received_bytes_total",
        "Bytes it received from there; uploads, and downloads through the cache, are not counted.",
        there="hub",
    ),
    Series(
        "gauge",
        "continual_hub_last_poll_timestamp_seconds",
        "When the Hub was last asked with success what is new, as seconds since 1970; kept over a restart.",
        there="polled",
    ),
    Series(
        "counter",
        "continual_notifications_total",
        "Messages to people, one for each address, by whether they were taken.",
        (("result", _RESULTS),),
        there="notify",
    ),
    Series(
        "counter",
        "continual_http_dropped_total",
        "Connections that the service did not answer as asked: too many at a time (full), a time-out (slow), asked for "
        "by a strange name (host), no HTTP (malformed).",
        (("reason", DROPPED),),
    ),
    Series(
        "gauge",
        "continual_build_info",
        "Always 1; the labels say what runs.",
        (("version", ()), ("torch", ()), ("rule", ()), ("device", ())),
    ),
)
BY_NAME = {row.name: row for row in TABLE}
BUCKETS = _SECONDS


def markdown() -> str:
    """The table as the page about it has it (operations.md)."""
    lines = ["| series | kind | labels | when it is there | what it says |", "|---|---|---|---|---|"]
    for row in TABLE:
        labels = "; ".join(
            f"`{name}`" + (f": {', '.join(f'`{value}`' for value in values)}" if 0 < len(values) <= 12 else "")
            for name, values in row.labels
        )
        lines.append(f"| `{row.name}` | {row.kind} | {labels} | {FEATURES[row.there]} | {row.help} |")
    return "\n".join(lines)
