"""A LoRA file of another trainer than PEFT, as an adapter.

What it makes of a base is known once the base is: names with underscores have a meaning only among the base's modules.
Where the scale comes from: alpha over rank for each module that has an alpha in the file; the configuration that
diffusers writes into the header of the file (`lora_adapter_metadata`); else 1 in the layouts whose programs read a file
without alpha so: Kohya's, LyCORIS' and diffusers'. PEFT's own layout says nothing without its configuration, and is
refused without one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from continual.errors import Refuse
from continual.outside import Malformed, few, parse_fields, shown
from continual.records import FileStat
from continual.tensors.adapters.adapter import Adapter, kind_of
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.adapters.loras import parsing
from continual.tensors.adapters.loras.parsing import Group, groups
from continual.tensors.adapters.loras.targets import Meant, Name, Targets, name_of
from continual.tensors.adapters.pieces import KINDS, Piece
from continual.tensors.adapters.pieces.low_rank import BIAS, MAGNITUDE, A, B
from continual.tensors.adapters.pieces.trained import Difference, Rows, RowsOf, Trained, Tucker
from continual.tensors.checkpoints.checkpoint import FLOATS, Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.names.kinds import BaseModel

CONFIGURATION = "lora_adapter_metadata"
"""What diffusers calls the adapter's configuration in the header of a file."""
_ALPHAS = ("lora_alpha", "ss_network_alpha")
"""What else a header may call the alpha of all modules."""
_OF_PEFT: Mapping[str, str] = {
    parsing.DOWN: A,
    parsing.UP: B,
    parsing.BIAS: BIAS,
    parsing.MAGNITUDE: MAGNITUDE,
    parsing.TABLE_A: "lora_embedding_A",
    parsing.TABLE_B: "lora_embedding_B",
}


class LoraFile(Adapter):
    """A file of LoRA factors, open for reading, without a configuration beside it. Its pieces are those for one base:
    see `of`."""

    def __init__(self, weights: Checkpoint) -> None:
        """Takes over an open checkpoint, whose tensors are those of a LoRA. Raises Refuse for a tensor that belongs to
        none, and for a header that says something malformed."""
        self.weights = weights
        self.place = weights.place
        self.transposed = False
        self.groups = groups(weights.tensors, str(self.place))
        for info in weights.tensors.values():
            if info.dtype not in FLOATS and info.shape:
                raise Refuse("dtype", f"{self.place}: tensor {info.name} is {info.dtype}: convert it to F32 or BF16")
        self.file, self.said = weights.metadata()
        self.config = Fields.of(self.place, self.file, {})
        self.configuration = self._configuration()
        self.pieces, self.saved = {}, {}

    def close(self) -> None:
        """Closes the file."""
        self.weights.close()

    @property
    def files(self) -> tuple[FileStat, ...]:
        """The one file."""
        return self.weights.files

    def check_unchanged(self) -> None:
        """Raises Retry if the file changed since it was opened."""
        self.weights.check_unchanged()

    def of(self, base: BaseModel) -> Adapter:
        """The same adapter with its pieces by the names of the base's weights. It shares the open file.

        Raises Refuse (`adapter-target`) naming modules that the base lacks, (`adapter-kind`, `shape`, `config`) for
        what is not understood.
        """
        found = copy.copy(self)
        targets = Targets(base)
        if not targets.components:
            found.pieces, found.outside = self._plain(base), ()
            return found
        met: dict[str, tuple[Group, Name, Meant]] = {}
        lost: list[str] = []
        outside: list[str] = []
        for group in self.groups:
            name = name_of(group.module)
            target = targets.find(name, group.module, str(self.place))
            if target is not None:
                met[group.module] = group, name, target
            else:
                (lost if targets.has(name) else outside).append(group.module)
        if lost:
            raise Refuse(
                "adapter-target",
                f"{self.place}: adapts {few(lost)}, which the base does not have: a LoRA of another model",
            )
        found.pieces = self._pieces(targets, met)
        found.outside = tuple(outside)
        return found

    def _pieces(self, targets: Targets, met: Mapping[str, tuple[Group, Name, Meant]]) -> dict[str, Piece]:
        made: dict[str, Piece] = {}
        ours: dict[str, str] = {}
        by_config = self._configured(met)
        for module, (group, name, target) in met.items():
            for end, piece in (by_config.get(module) or self._alone(group, name)).items():
                for weight, part in self._parts(targets, target, end, piece):
                    if weight in made:
                        raise Refuse("adapter-kind", f"{self.place}: {ours[weight]} and {module} are both {weight}")
                    made[weight], ours[weight] = part, module
        return made

    def _parts(self, targets: Targets, target: Meant, end: str, piece: Piece) -> list[tuple[str, Piece]]:
        """A piece for each of the base's weights that one of the file is."""
        names = [module + end for module in target.modules]
        if gone := next((name for name in names if name not in targets.specs), None):
            raise Refuse(
                "adapter-target", f"{self.place}: {piece.names[0]} changes {gone}, which the base does not have"
            )
        sizes = [(targets.specs[name].shape or (0,))[0] for name in names]
        total = sum(sizes)
        if target.swapped:
            half = total // 2
            return [(names[0], RowsOf.of(str(self.place), piece, ((half, total), (0, half)), total))]
        if len(names) == 1:
            return [(names[0], piece)]
        found: list[tuple[str, Piece]] = []
        at = 0
        for name, size in zip(names, sizes, strict=True):
            rows: Rows = ((at, at + size),)
            found.append((name, RowsOf.of(str(self.place), piece, rows, total)))
            at += size
        return found

    def _plain(self, base: BaseModel) -> dict[str, Piece]:
        """The pieces for a base that is no diffusion model, by the names that the file has for its weights."""
        if other := next((group for group in self.groups if name_of(group.module).underscored), None):
            raise Refuse(
                "adapter-target",
                f"{self.place}: {shown(other.module)} is of a LoRA of a diffusion model, and {base.checkpoint.place}, "
                "the base, is none in the layout of diffusers: a base of that kind is a pipeline as diffusers saves "
                "it (model_index.json), or its component",
            )
        made: dict[str, Piece] = {}
        bare = {group.module: group.module.removeprefix("base_model.model.") for group in self.groups}
        met = {g.module: (g, Name((), bare[g.module], bare=True), Meant((bare[g.module],))) for g in self.groups}
        by_config = self._configured(met)
        for module, (group, name, _) in met.items():
            pieces = by_config.get(module) or self._alone(group, name)
            made |= {bare[module] + end: piece for end, piece in pieces.items()}
        return made

    def _configuration(self) -> Mapping[str, object] | None:
        """The configuration in the header, if there is one."""
        text = self.said.get(CONFIGURATION)
        if text is None:
            return None
        try:
            body = parse_fields(text.encode())
        except Malformed as error:
            raise Refuse("config", f"{self.file}: {CONFIGURATION} in its header is no valid JSON ({error})") from None
        if twice := next((g.roles[parsing.ALPHA] for g in self.groups if parsing.ALPHA in g.roles), None):
            raise Refuse(
                "config", f"{self.file}: {CONFIGURATION} in its header says the alphas, and {twice.name} says one too"
            )
        return body

    def _configured(self, met: Mapping[str, tuple[Group, Name, Meant]]) -> dict[str, dict[str, Piece]]:
        """The pieces of the modules about which the header's configuration says something."""
        body = self.configuration
        if body is None:
            return {}
        found: dict[str, dict[str, Piece]] = {}
        for component in ("", *dict.fromkeys(head for _, name, _ in met.values() for head in name.components)):
            own = _of_component(body, component)
            modules = {
                name.rest: module
                for module, (_, name, _) in met.items()
                if module not in found and (not component or component in name.components) and not name.underscored
            }
            if not own or not modules:
                continue
            fields = Fields.of(self.place, f"{self.file}: {CONFIGURATION}", {"peft_type": "LORA", **own})
            tensors = {rest: _for_peft(met[module][0]) for rest, module in modules.items()}
            made = kind_of(fields).pieces(fields, tensors)
            for weight, piece in made.items():
                rest, dot, end = weight.rpartition(".")
                found.setdefault(modules[rest], {})[dot + end] = piece
        return found

    def _alone(self, group: Group, name: Name) -> dict[str, Piece]:
        """The pieces of one module by what ends the names of their weights, from its own tensors."""
        roles = dict(group.roles)
        made: dict[str, Piece] = {}
        alpha = roles.pop(parsing.ALPHA, None)
        if alpha is not None and math.prod(alpha.shape) != 1:
            raise Refuse("shape", f"{self.place}: {alpha.name} is {list(alpha.shape)}, no single number")
        for role, end in ((parsing.DIFF, ".weight"), (parsing.DIFF_BIAS, ".bias")):
            if role in roles:
                made[end] = Difference(str(self.place), roles.pop(role))
        if not roles:
            return made
        if ".weight" in made or (made and parsing.BIAS in roles):
            raise self._incomplete(group)
        trained = roles.pop(parsing.BIAS, None)
        by_rows = parsing.MAGNITUDE in roles
        lengths = roles.pop(parsing.MAGNITUDE, None) or roles.pop(parsing.DORA, None)
        inner, rank, scaled = self._inner(group, roles)
        scale = 1.0
        if alpha is not None and scaled:
            scale = 1.0 / rank
        elif alpha is None and not self._is_whole_by_itself(name, inner):
            scale = self._said_alpha(group) / rank
        if trained is not None:
            made[".bias"] = Trained(str(self.place), Difference(str(self.place), trained), scale, alpha)
        made[".weight"] = Trained(str(self.place), inner, scale, alpha if scaled else None, lengths, by_rows)
        return made

    def _inner(self, group: Group, roles: Mapping[str, TensorInfo]) -> tuple[Piece, int, bool]:
        """What a module's factors make at scale 1, their rank, and whether alpha scales it."""
        have = roles.keys()
        if have == {parsing.DOWN, parsing.MID, parsing.UP}:
            down = roles[parsing.DOWN]
            piece = Tucker(str(self.place), down, roles[parsing.MID], roles[parsing.UP])
            return piece, _first(down), True
        if have == {parsing.DOWN, parsing.UP}:
            return self._of_kind("LORA", group, {A: roles[parsing.DOWN], B: roles[parsing.UP]}, roles[parsing.DOWN])
        if have == {parsing.TABLE_A, parsing.TABLE_B}:
            return self._of_kind("LORA", group, _for_peft(group), roles[parsing.TABLE_A])
        for kind, told in (("LOHA", ("hada_w1_b",)), ("LOKR", ("lokr_w2_b", "lokr_w1_b"))):
            if have and all(role.startswith(told[0][:4]) for role in have):
                ranked = next((roles[role] for role in told if role in roles), None)
                return self._of_kind(kind, group, roles, ranked)
        raise self._incomplete(group)

    def _of_kind(
        self, kind: str, group: Group, roles: Mapping[str, TensorInfo], ranked: TensorInfo | None
    ) -> tuple[Piece, int, bool]:
        """The piece of one of PEFT's kinds at scale 1; `ranked` has the rank as its first size, if anything has."""
        rank = 1 if ranked is None else _first(ranked)
        if rank < 1:
            raise self._incomplete(group)
        fields = Fields.of(self.place, self.file, {"r": rank, "lora_alpha": rank, "alpha": rank, "peft_type": kind})
        (piece,) = KINDS[kind].pieces(fields, {group.module: roles}).values()
        return piece, rank, ranked is not None

    def _incomplete(self, group: Group) -> Refuse:
        listed = ", ".join(sorted(info.name for info in group.roles.values()))
        return Refuse("adapter-kind", f"{self.place}: {listed}: no whole set of factors of one module")

    def _is_whole_by_itself(self, name: Name, inner: Piece) -> bool:
        """Whether factors without an alpha mean what they are, in the programs that the file was made for."""
        return not name.bare or any(".processor." in part or "lora_linear_layer" in part for part in inner.names)

    def _said_alpha(self, group: Group) -> float:
        """The alpha of all modules as the header says it. Raises Refuse (`config`) where it does not."""
        for key in _ALPHAS:
            try:
                value = float(self.said.get(key, ""))
            except ValueError:
                continue
            if 0 <= value <= 1e30:
                return value
        raise Refuse(
            "config",
            f"{self.file}: says no alpha of {shown(group.module)}, so that the scale of its LoRA is not known: put the "
            'adapter_config.json of the training beside it, or one with {"peft_type": "LORA", "r": RANK, '
            '"lora_alpha": ALPHA}',
        )


def _for_peft(group: Group) -> dict[str, TensorInfo]:
    """A module's tensors under PEFT's words for them."""
    return {_OF_PEFT.get(role, role): info for role, info in group.roles.items()}


def _of_component(body: Mapping[str, object], component: str) -> dict[str, object]:
    """What a configuration in a header says of one component; with none, what it says of all."""
    if component:
        head = f"{component}."
        return {key.removeprefix(head): value for key, value in body.items() if key.startswith(head)}
    return {key: value for key, value in body.items() if "." not in key}


def _first(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 0
