"""A small model that is folded and exported as a large one would be, with the clock on it: what each stage takes of an
element, of a matrix and of a tensor, by the code that does the work itself.

The sample has a table of words for all that goes element by element, matrices of two sizes for each form that the large
model has, and tiny tensors, which show what a tensor takes however small it is.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from continual.api import Merge
from continual.config import Settings
from continual.engine.planning import peak
from continual.engine.views import ReadView
from continual.lazily import Dtypes, Tensor, torch
from continual.making import Recipe, init
from continual.publish import exported_weights
from continual.publish.folder import Target
from continual.publish.weights import Placed, header, raw
from continual.records import ITEMSIZE, TensorSpec
from continual.rules import Rule
from continual.rules.matrices import sides
from continual.state.durable import environment
from continual.timing.clock import Profile, Spent, profiled

TABLE = "model.embed_tokens.weight"
WIDTH = 1024
ROWS = 4096
"""Elements of the table: 8 MB of bfloat16."""
SIDE = 512
"""Smaller side of the larger matrices of each form."""
FORMS = 3
"""Forms of matrices that are sampled: those that take most. Others are taken for the nearest."""
LONGEST = 8
"""Longer side of a sampled matrix, in smaller sides."""
SMALL_ONES, LARGE_ONES = 4, 2
"""Matrices of each size: the least that one of them takes counts."""
TINY = 16
DTYPES = Dtypes({"F32": "float32", "F16": "float16", "BF16": "bfloat16"})


class MatrixForm(NamedTuple):
    """Matrices of one form: the binary logarithm of rows over columns, rounded."""

    ratio: int

    @classmethod
    def of(cls, spec: TensorSpec) -> MatrixForm:
        """The form of a matrix, or of those in a stack."""
        m, n = sides(spec.expert if spec.kind == "stack" else spec)
        return cls(round(math.log2(m / n)))

    def shape(self, side: int) -> tuple[int, int]:
        """A matrix of this form with this smaller side."""
        longer = side * min(LONGEST, 1 << abs(self.ratio))
        return (longer, side) if self.ratio >= 0 else (side, longer)

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the smaller and the larger matrices are called, several of each: what else goes on on a machine can only
        add to what one of them takes."""
        word = f"{'tall' if self.ratio >= 0 else 'wide'}{abs(self.ratio)}"
        small, large = (
            tuple(f"model.layers.{number}.mlp.{word}_{size}.weight" for number in range(copies))
            for size, copies in (("small", SMALL_ONES), ("large", LARGE_ONES))
        )
        return small, large


class How(NamedTuple):
    """What is to be sampled: the rule with its options, the ways in which it is read, and the settings."""

    rule: Rule
    views: Sequence[ReadView]
    settings: Settings


@dataclass(frozen=True, slots=True)
class WorkSample:
    """A piece of work on the sample: what each of its tensors took by stage, and the main thread besides."""

    tensors: Mapping[str, Mapping[str, Spent]]
    main: Mapping[str, Spent]


class ExportSample(NamedTuple):
    """An export of the sample, the rule that read it, and for a model of the large one's tensors: peak bytes beside
    what the process holds, and bytes of a scratch file."""

    work: WorkSample
    rule: Rule
    memory: int
    scratch: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All that was tried: the first fold, one that comes later, an export in each way. `forms` and `sizes`: the
    matrices that the sample has, and their smaller sides."""

    first: WorkSample
    later: WorkSample
    exports: tuple[ExportSample, ...]
    forms: tuple[MatrixForm, ...]
    sizes: tuple[int, int]


def whole(spec: TensorSpec, made: Rule) -> bool:
    """Whether folding or reading this tensor looks at it as a matrix."""
    return spec.kind != "carried" and not (made.fold.elementwise(spec) and made.read.elementwise(spec))


def forms_of(specs: Iterable[TensorSpec], made: Rule) -> tuple[tuple[MatrixForm, ...], int]:
    """The forms of matrices that take most, and the smaller side of the larger sample of each."""
    work: dict[MatrixForm, float] = {}
    longest = 0
    for spec in specs:
        if whole(spec, made):
            m, n = sides(spec.expert if spec.kind == "stack" else spec)
            form = MatrixForm.of(spec)
            work[form] = work.get(form, 0.0) + float(m) * n * min(m, n) * max(1, spec.experts)
            longest = max(longest, min(m, n))
    dearest = sorted(work, key=lambda form: -work[form])[:FORMS]
    return tuple(dearest), min(SIDE, longest)


def take(how: How, specs: Sequence[TensorSpec], directory: Path) -> Sample:
    """Makes, folds and exports a sample of a model of `specs`, in a scratch directory in `directory` that is gone
    afterwards. A few seconds. Raises Retry where the disk gets in the way."""
    forms, side = forms_of(specs, how.rule)
    sizes = (max(1, side // 2), max(1, side))
    shapes: dict[str, tuple[int, ...]] = {TABLE: (ROWS, WIDTH)}
    for form in forms:
        for names, size in zip(form.names, sizes, strict=True):
            shapes |= dict.fromkeys(names, form.shape(size))
    shapes |= {f"model.layers.{number}.input_layernorm.weight": (16,) for number in range(TINY)}
    with environment("cannot try a sample"), tempfile.TemporaryDirectory(prefix=".continual-", dir=directory) as made:
        models = _models(Path(made), shapes, dtype_of(specs))
        folds, exports = _works(how, specs, Path(made), models)
    return Sample(*folds, exports, forms, sizes)


def dtype_of(specs: Iterable[TensorSpec]) -> str:
    """The safetensors word of the floats that most of the bytes are of."""
    nbytes: dict[str, int] = {}
    for spec in specs:
        if spec.dtype in DTYPES:
            nbytes[spec.dtype] = nbytes.get(spec.dtype, 0) + spec.nbytes
    return max(nbytes, key=lambda word: nbytes[word], default="BF16")


def _models(scratch: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[Path]:
    """A base and two fine-tunes."""
    random = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    found = [_written(scratch / "base", values, dtype)]
    for tune in ("first", "second"):
        changed = {name: value + 0.02 * _change(value.shape, random) for name, value in values.items()}
        found.append(_written(scratch / tune, changed, dtype))
    return found


def _change(shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Noise, in matrices with one direction that stands out of it as in those that were trained, or a gate would take
    it for noise."""
    noise = torch.randn(*shape, generator=random)
    if len(shape) < 2:
        return noise
    left, right = torch.randn(shape[0], generator=random), torch.randn(shape[1], generator=random)
    return noise.addr_(left / left.norm(), right / right.norm(), alpha=4.0 * (shape[0] ** 0.5 + shape[1] ** 0.5))


def _written(directory: Path, values: Mapping[str, Tensor], dtype: str) -> Path:
    """A model directory of one file."""
    directory.mkdir()
    placed, end = [], 0
    for name, value in values.items():
        begin, end = end, end + value.numel() * ITEMSIZE[dtype]
        placed.append(Placed(name, name, dtype, tuple(value.shape), begin, end))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header(placed))
        for value in values.values():
            file.write(raw(value.to(DTYPES[dtype])))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return directory


def _works(
    how: How, specs: Sequence[TensorSpec], scratch: Path, models: Sequence[Path]
) -> tuple[tuple[WorkSample, WorkSample], tuple[ExportSample, ...]]:
    """What two folds and the exports took."""
    base, *tunes = models
    options = {key: value for key, value in how.rule.options.items() if key != "include"}
    on = how.settings
    settings = Settings(state=scratch / "state", workers=on.workers, memory=on.memory, device=on.device)
    init(base, settings.state, Recipe(rule=how.rule.name, options=options))
    folds = []
    for tune in tunes:
        with Merge(settings, write=True) as merge:
            assert merge.engine.base is not None, "opened before the clock runs"
            with profiled() as profile:
                outcome = merge.fold(tune)
            assert outcome.fate == "folded", outcome.message
        folds.append(_work(profile))
    exports = []
    for number, view in enumerate(how.views):
        with Merge(settings) as merge:
            assert merge.base is not None
            reading = merge.reading(view=view)
            spooled = reading.options.needs(reading.size())
            with profiled() as profile:
                merge.export(Target(scratch / f"export-{number}"), view=view)
            most = peak(merge.executor, [exported_weights.need(spec, reading) for spec in specs])
        apart = sum(4 * spec.numel for spec in specs if spec.kind != "carried" and not reading.elementwise(spec))
        exports.append(ExportSample(_work(profile), reading.rule, most, apart if spooled else 0))
    return (folds[0], folds[1]), tuple(exports)


def _work(profile: Profile) -> WorkSample:
    main: dict[str, Spent] = {}
    for track in profile.tracks:
        if not track.name:
            for stage, spent in track.spent.items():
                main.setdefault(stage, Spent()).add(spent)
    return WorkSample(profile.tensors, main)
