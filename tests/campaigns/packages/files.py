"""What linters and renderers say of the container's and the cluster's files.

    pip install -c ops/constraints.txt -e ".[packages]"
    python -m tests.campaigns.packages.files

hadolint over the Containerfile; the compose files as compose reads them; the chart linted and rendered by Helm's own
library, with its schema, and each object of it, and of the KubeRay example where Kubernetes knows its kind, checked
against the schemas of Kubernetes. Exit code 1 where something is wrong. Nothing is built or started: that needs images
from a registry, and a cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

OPS = Path(__file__).parents[3] / "ops"
VERSIONS = ("1.28", "1.31", "1.34")
"""Of Kubernetes, whose schemas the objects have to fit."""
PLAIN: dict[str, Any] = {"base": "/bases/small"}
FULL: dict[str, Any] = {
    "base": "org/base@main",
    "initFlags": "--adapters",
    "config": 'watch = ["/in"]\nkeep = 5\n\n[hub]\nwatch = true\n',
    "existingSecret": "hub",
    "gpu": {"count": 1, "runtimeClassName": "nvidia"},
    "models": {"existingClaim": "models"},
    "merged": {"existingClaim": "merged"},
    "storage": {"storageClassName": "fast"},
    "imagePullSecrets": [{"name": "pull"}],
    "nodeSelector": {"gpu": "yes"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
}
WRONG: list[dict[str, Any]] = [
    {},
    {"base": ""},
    {"base": "a", "replicas": 2},
    {"base": "a", "gpu": {"count": 2}},
    {"base": "a", "storage": {"size": "much"}},
]
"""Values that the chart has to refuse."""


def ran(*command: str, **variables: str) -> list[str]:
    """What a program complains of."""
    beside = Path(sys.executable).parent
    program = shutil.which(command[0], path=f"{beside}:{os.environ['PATH']}")
    if program is None:
        sys.exit(f"{command[0]} is not there: pip install -c ops/constraints.txt -e '.[packages]'")
    done = subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, check=False, env=os.environ | variables
    )
    return [] if done.returncode == 0 else [(done.stdout + done.stderr).strip() or f"exit code {done.returncode}"]


def container() -> list[str]:
    """Containerfile and compose files."""
    folder = OPS / "container"
    compose, gpu = folder / "compose.yaml", folder / "compose.gpu.yaml"
    found = ran("hadolint", str(folder / "Containerfile"))
    for files in ([compose], [compose, gpu]):
        named = [word for file in files for word in ("-f", str(file))]
        found += ran("docker-compose", *named, "config", "--quiet", INIT_BASE="/bases/small")
    return found


def objects(texts: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects in manifests."""
    for text in texts:
        yield from (found for found in yaml.safe_load_all(text) if isinstance(found, dict))


def checked(made: dict[str, Any]) -> list[str]:
    """What the schemas of Kubernetes say of an object. A kind that an operator brings is not theirs, but the pods of
    Ray's are."""
    import kubernetes_validate

    called = f"{made['kind']} {made['metadata']['name']}"
    if made["kind"] == "RayJob":  # a CRD: its pods are validated, and not what is around them
        cluster = made["spec"]["rayClusterSpec"]
        pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
        named = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": called}, **pod} for pod in pods]
        return [said for pod in named for said in checked(pod)]
    if made["kind"] == "ServiceMonitor":  # the validator knows no CRDs: only that it renders is seen
        return []
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(made, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{called}, {version}: {error.message}")
    return found


def chart() -> list[str]:
    """The chart with few values, with all, and with wrong ones; and that a wrong object would be found."""
    import helm_python

    folder = str(OPS / "kubernetes/chart")
    found = list(helm_python.lint(folder, PLAIN)["errors"])
    with helm_python.Chart.load(folder) as loaded:
        for values in (PLAIN, FULL):
            loaded.validate_schema(loaded.merge_values(values))
            manifests = loaded.render(values, name="demo", namespace="prod")
            made = list(objects(text for name, text in manifests.items() if name.endswith(".yaml")))
            kinds = sorted(one["kind"] for one in made)
            expected = [
                "ConfigMap",
                "NetworkPolicy",
                "Service",
                *(["ServiceMonitor"] if values is FULL else []),
                "StatefulSet",
            ]
            found += [] if kinds == expected else [f"{kinds}, not {expected}"]
            found += [said for one in made for said in checked(one)]
        for values in WRONG:
            try:
                loaded.render(values, name="demo", namespace="prod")
            except helm_python.HelmError:
                continue
            found.append(f"the chart takes {values}")
    (spoilt,) = [one for one in made if one["kind"] == "StatefulSet"]
    spoilt["spec"]["template"]["spec"]["containers"][0]["ports"] = "http"
    return found if checked(spoilt) else [*found, "the schemas of Kubernetes take anything"]


def main() -> int:
    wrong = 0
    example = OPS / "kubernetes/kuberay.yaml"
    for what, found in {
        "Containerfile and compose files": container(),
        "chart": chart(),
        "KubeRay example": [said for one in objects(iter([example.read_text()])) for said in checked(one)],
    }.items():
        print(f"{'ok  ' if not found else 'WRONG'} {what}", *found, sep="\n     " if found else " ")
        wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
