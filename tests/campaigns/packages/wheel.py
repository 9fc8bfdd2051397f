"""The wheel, installed as a user installs it, in an environment of its own, and used from there.

    python -m tests.campaigns.packages.wheel

Builds it, has `pipx install` put it and all it needs (some hundred megabytes) into a new place with the pins of
ops/constraints.txt, and then makes a state, folds by hand and by the daemon, exports, completes a word in a real bash,
and drains: by the program that was installed, in a directory and an environment that know nothing of this checkout.
Exit code 1 where something differs; `--work DIR` keeps the place. Needs a package index; some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.helpers import models

ROOT = Path(__file__).parents[3]
CLEAN = ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE", "PIP_CERT", "PIP_FIND_LINKS", "PIP_INDEX_URL")
"""Variables of this process that the installed program has, too: none of Python's, none of continual's."""


def run(*command: object, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=1800)


def must(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed. Ends the campaign where it failed."""
    if done.returncode != 0:
        sys.exit(
            f"{' '.join(map(str, done.args))}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def until(what: str, found: Callable[[], object]) -> None:
    """Waits until it is so."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        try:
            if found():
                print(f"ok   {what}")
                return
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.1)
    sys.exit(f"not within three minutes: {what}")


def installed(work: Path, environment: dict[str, str]) -> Path:
    """The program that pipx installed from the wheel."""
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", work / "dist", ROOT)
    must(run(*build, cwd=work, environment=environment))
    (wheel,) = (work / "dist").glob("*.whl")
    print(f"ok   {wheel.name}, {wheel.stat().st_size:,} bytes")
    must(run(sys.executable, "-m", "venv", work / "pipx", cwd=work, environment=environment))
    must(run(work / "pipx/bin/pip", "install", "-q", "pipx", cwd=work, environment=environment))
    began = time.monotonic()
    pins = f"--quiet --constraint={ROOT / 'ops/constraints.txt'}"
    command = (work / "pipx/bin/pipx", "install", f"--pip-args={pins}", "--python", sys.executable, wheel)
    must(run(*command, cwd=work, environment=environment))
    print(f"ok   pipx installed it in {time.monotonic() - began:.0f} s")
    return work / "bin/continual"


def use(program: Path, work: Path, environment: dict[str, str]) -> None:
    """A user's first minutes."""

    def called(*words: object) -> str:
        return must(run(program, *words, cwd=work, environment=environment))

    print(f"ok   {called('--version').strip()}, {program.resolve()}")
    python = program.resolve().with_name("python")
    inside = must(run(python, "-c", "import continual; print(continual.__file__)", cwd=work, environment=environment))
    assert str(work) in inside, inside
    models.base(work / "base")
    models.fine_tune(work / "base", work / "alice", 1)
    called("init", "base", "--state", "state")
    assert "folded" in called("fold", "alice", "--state", "state")
    print("ok   a state, a fold")
    (work / "in").mkdir()
    models.fine_tune(work / "base", work / "in/bob", 2)
    flags = (
        "--state",
        "state",
        "--watch",
        "in",
        "--port",
        "0",
        "--settle",
        "0.2",
        "--current",
        "current",
        "--log-file",
        "log",
    )
    with subprocess.Popen([program, "run", *flags], cwd=work, env=environment) as daemon:
        try:

            def folds() -> int:
                told = json.loads(called("status", "--state", "state", "--json"))
                if not told.get("url"):
                    return 0
                with urllib.request.urlopen(told["url"] + "/", timeout=10) as page:
                    text = page.read().decode()
                return int(told["folds"]) if "bob" in text else 0

            until("the daemon folds, and its page shows it", lambda: folds() == 2)
            until("the link is put", lambda: (work / "current/continual.json").is_file())
            assert "has ended" in called("drain", "--state", "state")
            assert daemon.wait(60) == 0
        finally:
            daemon.kill()
    called("export", "merged", "--state", "state")
    assert called("verify", "--state", "state")
    print("ok   drained, exported, verified")
    complete(program, work, environment)


def complete(program: Path, work: Path, environment: dict[str, str]) -> None:
    """Tab in a real bash, by what `--install-completion` writes."""
    home = work / "home"
    home.mkdir()
    at_home = {
        **environment,
        "HOME": str(home),
        "PATH": f"{program.parent}:{environment['PATH']}",
        "SHELL": "/bin/bash",
    }
    must(run(program, "--install-completion", "bash", cwd=work, environment=at_home))
    script = f"""
source {home}/.bash_completions/continual.sh
COMP_WORDS=(continual qua); COMP_CWORD=1
$(complete -p continual | sed 's/.*-F \\([^ ]*\\).*/\\1/') continual qua continual
echo "${{COMPREPLY[@]}}"
"""
    said = must(run("bash", "--norc", "-c", script, cwd=work, environment=at_home)).split()
    assert said == ["quarantine"], said
    print("ok   bash completes `continual qua` to quarantine")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="continual-wheel-") as found:
        work = (asked.work or Path(found)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        environment = {name: os.environ[name] for name in CLEAN if name in os.environ}
        environment |= {"PIPX_HOME": str(work / "pipx-home"), "PIPX_BIN_DIR": str(work / "bin")}
        use(installed(work, environment), work, environment)


if __name__ == "__main__":
    main()
