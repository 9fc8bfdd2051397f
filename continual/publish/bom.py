"""What a merge is made of, as a bill of materials in CycloneDX's form (`bom.cdx.json`): the base, each model in it with
commit, hash and licence, and the rule that merged them. Written by CycloneDX's own library, the extra `bom`.

It says what `continual.json` beside it says, and nothing of this machine: the same file goes out with a release.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from continual.errors import Misconfigured
from continual.records import SCHEME
from continual.state import State
from continual.state.format import FoldCommit
from continual.state.software import software
from continual.tensors.checkpoints.place import RELEASE

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License
    from packageurl import PackageURL

BOM = "bom.cdx.json"
"""The file; its name is what CycloneDX asks for."""
_BLAKE3 = re.compile(r"(?:blake3:)?([0-9a-f]{64})")


def check() -> None:
    """Raises Misconfigured where the extra is not installed."""
    if find_spec("cyclonedx") is None:
        raise Misconfigured("bom = true: a package is not there that writes it: pip install 'continual[bom]'")


def write(directory: Path, state: State, seq: int, name: str) -> None:
    """Writes the bill of the export of record `seq` in `directory`, whose `continual.json` is there; `name`: what the
    model is called. Raises Misconfigured."""
    check()
    body = json.loads((directory / RELEASE).read_bytes())
    text = _text(_bill(body, state, seq, name))
    (directory / BOM).write_text(text, "utf-8")


def _text(bill: Bom) -> str:
    from cyclonedx.output.json import JsonV1Dot6

    return str(JsonV1Dot6(bill).output_as_string(indent=2)) + "\n"


def _bill(body: Mapping[str, object], state: State, seq: int, name: str) -> Bom:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType

    commit = state.ledger.get(seq)
    read = _read(body, state.ledger.folds(seq))
    merged = Component(
        name=_plain(name),
        version=str(seq),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="merge",
        description=f"The merge of {len(read)} fine-tunes of one base.",
        properties=_properties(
            {
                "state": state.id,
                "record": seq,
                "crc": commit.crc,
                "rule": _rule(body, state),
                "options": state.format.options,
                "read": body.get("read"),
                **({"view": view["name"]} if isinstance(view := body.get("view"), Mapping) and "name" in view else {}),
            }
        ),
    )
    models = [_model(fold, number, weight) for number, (fold, weight) in enumerate(read, 1)]
    parts = [_base(state), *models]
    rule = Component(
        name="continual",
        version=software()["continual"],
        type=ComponentType.APPLICATION,
        bom_ref="continual",
        properties=_properties({"rule": _rule(body, state), "torch": software()["torch"]}),
    )
    seed = f"{state.id} {seq} {body.get('contents')} {body.get('mark')}"
    bill = Bom(components=[*parts, rule], serial_number=uuid.uuid5(uuid.NAMESPACE_URL, seed))
    bill.metadata.component = merged
    bill.metadata.timestamp = datetime.fromisoformat(commit.time)
    bill.register_dependency(merged, [*parts, rule])
    return bill


def _rule(body: Mapping[str, object], state: State) -> str:
    """The rule that read the merge."""
    read = body.get("read")
    found = read.get("rule") if isinstance(read, Mapping) else None
    return str(found or state.format.rule)


def _read(body: Mapping[str, object], folds: Sequence[FoldCommit]) -> list[tuple[FoldCommit, object]]:
    """The models that are read, with their weights, as `continual.json` says."""
    rows = body.get("folded")
    weights: dict[tuple[object, object], object] = {}
    for row in rows if isinstance(rows, list) else ():
        weights[row.get("seq"), row.get("key")] = row.get("weight")
    found = [(fold, weights.get((fold.seq, fold.entry.candidate.key))) for fold in folds]
    return [(fold, weight) for fold, weight in found if weight is not None]


def _base(state: State) -> Component:
    """The base."""
    base = state.format.base
    name = base.repo or Path(base.path).name
    return _component(("base", name), base.revision, base.licence, base.repo, {})


def _model(fold: FoldCommit, number: int, weight: object) -> Component:
    """A model in the merge, the `number`-th."""
    candidate, digest = fold.entry.candidate, fold.entry.digest
    repo = candidate.origin.removeprefix(SCHEME) if candidate.origin.startswith(SCHEME) else None
    said = {"record": fold.seq, "form": candidate.form, "weight": weight, "digest": digest}
    names = f"model-{fold.seq}-{number}", candidate.name
    found = _component(names, candidate.revision, candidate.licence, repo, said)
    found.hashes = list(_hashes(digest))
    return found


def _component(
    names: tuple[str, str], revision: str | None, licence: str | None, repo: str | None, said: Mapping[str, object]
) -> Component:
    """A model that the merge is made of; `names`: by which it is referred to, and its own."""
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=_plain(names[1]),
        version=revision,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=names[0],
        licenses=list(_licences(licence)),
        purl=_purl(repo, revision),
        properties=_properties(said),
    )


def _licences(word: str | None) -> Iterator[License]:
    """A licence by its SPDX id, where the word is one."""
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.spdx import fixup_id

    if word:
        known = fixup_id(word)
        yield DisjunctiveLicense(id=known) if known else DisjunctiveLicense(name=_plain(word))


def _hashes(digest: str) -> Iterator[HashType]:
    """The content hash of a model, over its tensors in the order of their names."""
    from cyclonedx.model import HashAlgorithm, HashType

    if (found := _BLAKE3.fullmatch(digest)) is not None:
        yield HashType(alg=HashAlgorithm.BLAKE3, content=found[1])


def _purl(repo: str | None, revision: str | None) -> PackageURL | None:
    """Where a repo of the Hub is, as a package URL."""
    from packageurl import PackageURL

    if repo is None or "/" not in repo:
        return None
    owner, _, name = repo.partition("/")
    return PackageURL("huggingface", owner, name, revision)


def _plain(text: str) -> str:
    """A text that may be no Unicode, as names of files are."""
    return text.encode("utf-8", "backslashreplace").decode()


def _properties(said: Mapping[str, object]) -> list[Property]:
    from cyclonedx.model import Property

    def text(value: object) -> str:
        return _plain(value) if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)

    return [Property(name=f"continual:{key}", value=text(value)) for key, value in said.items() if value is not None]
