"""The unit of ops/systemd under a real systemd: started, used, reloaded, hung, stopped, and looked at from inside.

    sudo python -m tests.campaigns.packages.unit

Boots systemd in a container of systemd-nspawn (Debian: systemd-container) over a copy-on-write view of this machine,
which is gone afterwards. In it: the unit as it is committed, the drop-in that `continual config unit` writes, a user
continual, a state. What systemd and the daemon then do is compared with what is expected, a line each; exit code 1 if
one differs. `--keep FILE` keeps the journal. Needs root; takes about a minute.

Not shown by it: MemoryMax (the container has no memory controller where the machine has one of the old kind), and the
devices of a GPU: that others are shut and /dev/null is open is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
INSIDE = Path(__file__).with_name("inside_unit.py")
PREFIX = "/opt/continual"
STARTER = f"""#!{PREFIX}/python/bin/python3
import site, sys
sys.path.insert(0, "{PREFIX}/src")
site.addsitedir("{PREFIX}/packages")
from continual.cli.main import main
main()
"""
TARGET = """[Unit]
Requires=basic.target
After=basic.target
[Service]
Type=oneshot
ExecStart={python} {script}
ExecStopPost=/bin/systemctl exit --force
TimeoutStartSec=10min
StandardOutput=append:/campaign/out
StandardError=append:/campaign/out
"""


def prepare(root: Path, shared: Path) -> None:
    """Writes into the view of the machine what an operator installs."""
    opt = root / PREFIX.lstrip("/")
    (opt / ".venv/bin").mkdir(parents=True)
    for name in ("src", "packages", "python"):
        (opt / name).mkdir()
    starter = opt / ".venv/bin/continual"
    starter.write_text(STARTER)
    starter.chmod(0o755)
    units = root / "etc/systemd/system"
    shutil.copy(ROOT / "ops/systemd/continual.service", units)
    (root / "campaign").mkdir(exist_ok=True)
    shutil.copy(INSIDE, shared)
    python = f"{PREFIX}/python/bin/python3"
    (units / "campaign.service").write_text(TARGET.format(python=python, script=f"/campaign/{INSIDE.name}"))
    for name in ("apt-daily.timer", "apt-daily-upgrade.timer", "systemd-networkd.service", "getty.target"):
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")


def boot(shared: Path) -> int:
    """Runs in a mount namespace of its own: lays the view over the machine, and boots it."""
    with tempfile.TemporaryDirectory(prefix="continual-unit-") as found:
        over = Path(found)
        mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", found)
        for name in ("up", "work", "root"):
            (over / name).mkdir()
        root = over / "root"
        mount("-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={over / 'up'},workdir={over / 'work'}", str(root))
        try:
            prepare(root, shared)
            binds = {
                ROOT: f"{PREFIX}/src",
                Path(sysconfig.get_paths()["purelib"]): f"{PREFIX}/packages",
                Path(sys.base_prefix): f"{PREFIX}/python",
            }
            command = ["systemd-nspawn", "-q", "-D", str(root), "--register=no", "--keep-unit", "--private-network"]
            command += ["--capability=all", "--system-call-filter=bpf", f"--bind={shared}:/campaign"]
            command += [f"--bind-ro={here}:{there}" for here, there in binds.items()]
            command += ["-b", "systemd.unit=campaign.service", "systemd.show_status=no"]
            unified = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
            with (shared / "boot").open("w") as log:
                return subprocess.run(
                    command, env=unified, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, timeout=600
                ).returncode
        finally:
            subprocess.run(["umount", str(root)], check=False)
            subprocess.run(["umount", found], check=False)


def mount(*arguments: str) -> None:
    """Mounts, or says why not."""
    subprocess.run(["mount", *arguments], check=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, help="where the journal of the unit is kept")
    parser.add_argument("--boot", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.boot is not None:
        return boot(asked.boot)
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        print("this needs root and systemd-nspawn (Debian: apt-get install systemd-container)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="continual-unit-out-") as found:
        shared = Path(found)
        again = [sys.executable, "-m", "tests.campaigns.packages.unit", "--boot", found]
        subprocess.run(["unshare", "--mount", *again], check=False, cwd=ROOT)
        if asked.keep is not None and (shared / "journal").exists():
            shutil.copy(shared / "journal", asked.keep)
        report = shared / "report.json"
        if not report.exists():
            print("no report came out of the container", file=sys.stderr)
            for name in ("boot", "out"):
                if (shared / name).exists():
                    print(f"--- {name}\n{(shared / name).read_text(errors='replace')[-4000:]}", file=sys.stderr)
            return 1
        rows = json.loads(report.read_text())
        for what, good, said in rows:
            print(f"{'ok  ' if good else 'DIFFERS'} {what}: {said}")
        print(f"{sum(good for _, good, _ in rows)} of {len(rows)} as expected")
        return 0 if all(good for _, good, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
