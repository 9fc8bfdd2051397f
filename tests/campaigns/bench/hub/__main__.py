"""What the Hub costs: folding a model that is streamed against the same fold from a folder, candidates refused by their
headers, a webhook's way to a commit, and folds by a Ray cluster.

    python -m tests.campaigns.bench.hub [folds] [latency] [small] [webhook] [refused] [cluster] [--gigabytes 1.0]
    [--repeat 3] [--work DIR]

The loopback Hub (tests/loopback) runs in this process, every fold in one of its own with an empty HF_HOME, TMPDIR, HOME
and working directory. The ways of one rule are run in turn, each `--repeat` times, and medians shown; wall time has the
server's in it, which shares the machine: its CPU is shown beside.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.campaigns.bench.hub.by_cluster import by_cluster
from tests.campaigns.bench.hub.compared import RULES, WAYS, folds, latency, small
from tests.campaigns.bench.hub.told import webhook
from tests.campaigns.bench.hub.turned_away import refused
from tests.loopback import Hub, serving

PARTS: Mapping[str, Callable[[Path, Hub, argparse.Namespace], None]] = {
    "refused": refused,
    "webhook": webhook,
    "small": small,
    "latency": latency,
    "folds": folds,
    "cluster": by_cluster,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model in bf16")
    parser.add_argument("--repeat", type=int, default=3, help="folds of each rule and way")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--workers", type=int, default=0, help="tensors at a time; 0: one per core")
    parser.add_argument("--rate", type=float, default=0.0, help="of the Hub, MB/s for each connection of the cluster")
    parser.add_argument("--pushes", type=int, default=20)
    parser.add_argument("--work", type=Path, help="an empty directory; default: a temporary one")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as made, serving() as hub:
        for name in args.parts or PARTS:
            print(f"== {name}", flush=True)
            PARTS[name](args.work or Path(made), hub, args)


if __name__ == "__main__":
    main()
