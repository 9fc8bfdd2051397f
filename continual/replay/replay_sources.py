"""Where the models are now that a ledger names, and whether their bytes are those that were folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from continual.engine.engine import Engine
from continual.engine.outcomes import OpenCandidate
from continual.errors import Misconfigured, Refuse, Retry
from continual.executors.contract import Progress, Task
from continual.gates import Headers
from continual.gates.form import FormGate
from continual.outside import few
from continual.records import SCHEME, Candidate
from continual.replay.replay_steps import NeededModel
from continual.tensors import Adapter, Folder, LayerVectors, Model, Place, TaskVectors, digest_of, open_model
from continual.tensors.vectors.added import Content


class FoundModel(NamedTuple):
    """A model that has to be read again, where it is (None where it is nowhere), and why it cannot be used."""

    needed: NeededModel
    place: Place | None
    why: str = ""

    def body(self) -> dict[str, object]:
        """For machines."""
        candidate = self.needed.candidate
        place = None if self.place is None else str(self.place)
        return {"record": self.needed.seq, "name": candidate.name, "place": place, "why": self.why or None}


def find(
    engine: Engine, models: Mapping[str, NeededModel], directories: Sequence[Path], progress: Progress
) -> dict[str, FoundModel]:
    """Looks for each model below `directories`, and then where it came from, and reads all of it once: what is there
    has to have the content that the ledger says. Nothing is folded. Raises Misconfigured for a directory that is not
    there."""
    for directory in directories:
        if not directory.is_dir():
            raise Misconfigured(f"models = {directory}: no such directory")
    found: dict[str, FoundModel] = {}
    progress("check", 0, len(models))
    for key, needed in models.items():
        found[key] = _found(engine, needed, directories)
        progress("check", len(found), len(models))
    return found


def must_be_there(found: Mapping[str, FoundModel]) -> None:
    """Raises Misconfigured naming the models that cannot be read again."""
    if lacking := [one for one in found.values() if one.why]:
        told = few((f"{one.needed.candidate.name} (record {one.needed.seq}): {one.why}" for one in lacking), most=10)
        raise Misconfigured(
            f"{len(lacking)} of {len(found)} models cannot be folded again: {told}; nothing was built. Say where they "
            "are with --models DIR"
        )


def _found(engine: Engine, needed: NeededModel, directories: Sequence[Path]) -> FoundModel:
    candidate, whys = needed.candidate, []
    for where in _places(engine, candidate, directories):
        try:
            place = where()
            with open_model(place) as model:
                digest = content_digest(engine, reopened(engine, model, needed))
        except (Refuse, Retry, Misconfigured) as error:
            whys.append(str(error))
            continue
        if digest == needed.digest:
            return FoundModel(needed, place)
        whys.append(f"{place} holds other tensors than were folded")
    return FoundModel(needed, None, "; ".join(whys) or "it is nowhere")


def _places(engine: Engine, candidate: Candidate, directories: Sequence[Path]) -> Iterator[Callable[[], Place]]:
    """Where the model may be, the likeliest first; asking for a place raises what `engine.locate` does."""
    last = Path(candidate.origin).name
    names = [last, candidate.name, candidate.name.replace("/", "--")]
    if candidate.origin.startswith(SCHEME) and candidate.revision is not None:
        names.insert(0, f"{last}@{candidate.revision}")
    for directory in directories:
        for name in dict.fromkeys(names):
            path = directory / name
            if name not in ("", ".", "..") and ".." not in Path(name).parts and path.exists():
                yield partial(Folder, path, source=candidate.source)
    yield partial(engine.locate, candidate)


def reopened(engine: Engine, model: Model, needed: NeededModel) -> OpenCandidate:
    """An open model as it was folded. Raises Refuse and Retry."""
    lineage = engine.lineage(model, by_token=needed.by_token)
    headers = Headers(
        needed.candidate,
        model,
        engine.base,
        engine.state.id,
        lineage=lineage,
        open_weights=engine.resources.open_weights,
    )
    with engine.gates.told(form := engine.gates.the(FormGate)):
        seen = form.judge(headers)
    weights = None if seen is None else seen.weights
    return OpenCandidate(needed.candidate, model, lineage, needed.weight, weights)


def content_digest(engine: Engine, opened: OpenCandidate) -> str:
    """The content digest of a model, by reading all that a fold reads. Raises Refuse and Retry."""
    model, lineage = opened.model, opened.lineage
    specs = {spec.name: spec for spec in engine.base.specs}
    if engine.state.format.form is not None:
        assert isinstance(model, Adapter), "the gate on the form lets nothing else in"
        layers = LayerVectors(engine.base, model, lineage, opened.weights)
        layers.begin()

        def of_layer(name: str) -> bytes:
            *_, last = layers.read(specs[name])
            return last.digest

        tasks = [
            Task(name, layers.workspace(name) if not layers.is_thin(name) else 0, partial(of_layer, name))
            for name in lineage.folded
        ]
        return digest_of(dict(engine.executor.map(tasks)))
    shipped = engine.shipped(model, lineage)
    vectors = TaskVectors(engine.base, model, lineage, shipped=shipped)

    def of_tensor(name: str) -> bytes:
        content = Content()
        for start, stop, _ in vectors.runs(name, content):
            if shipped is not None:
                vectors.moments(name, start, stop, content)
        return content.digest()

    try:
        each = [Task(name, vectors.nbytes(name, whole=False), partial(of_tensor, name)) for name in lineage.folded]
        return digest_of(dict(engine.executor.map(each)))
    finally:
        if shipped is not None:
            shipped.close()
