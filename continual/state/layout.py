"""Where the accumulators of tensors lie below a generation, as Zarr arrays: each in one of its own, or those of one
shape together in one. FORMAT.md, *Generations*."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from continual.records import SlotSpec
from continual.state import arrays, names


@functools.cache
def node(slot: str, name: str) -> str:
    """Path below its generation of the array that has the accumulator of one tensor alone."""
    return f"{names.encode(slot)}/{names.encode(name)}"


class Location(NamedTuple):
    """Where an accumulator of one tensor is: in the Zarr array at the path `array` below its generation, of which it is
    all, or the one numbered `index`. `spec`: what it is itself."""

    array: str
    number: int | None
    spec: SlotSpec

    def __hash__(self) -> int:
        return hash((self.array, self.number))  # the spec follows from them, and takes longer

    @property
    def stem(self) -> str:
        """What the paths of its chunk files begin with."""
        return f"{self.array}/c" if self.number is None else f"{self.array}/c.{self.number}"

    def files(self, count: int | None = None) -> list[str]:
        """The paths of its chunk files, or of the first `count` of them, in row order."""
        stem = self.stem
        return [stem + suffix for suffix in arrays.suffixes(self.spec)[:count]]


class Together(NamedTuple):
    """A Zarr array that has the accumulators of several tensors, one after the other along its first axis."""

    spec: SlotSpec
    tensors: Sequence[str]

    def metadata(self) -> bytes:
        """Its zarr.json."""
        return arrays.metadata(self.spec, {"tensors": list(self.tensors)}, len(self.tensors))


class Layout:
    """Of a state with these slots. `together`: whether accumulators of one slot and one shape share an array."""

    def __init__(self, slots: Mapping[str, Mapping[str, SlotSpec]], together: bool) -> None:
        self._slots = slots
        found: dict[str, tuple[SlotSpec, list[str]]] = {}
        self._places: dict[tuple[str, str], Location] = {}
        for name, mine in slots.items() if together else ():
            for slot, spec in mine.items():
                path = f"{names.encode(slot)}/{'x'.join(map(str, spec.shape[1:])) or '1'}"
                alike, tensors = found.setdefault(path, (spec, []))
                assert alike == spec, f"{path}: {alike} and {spec} cannot share an array"
                self._places[name, slot] = Location(path, len(tensors), spec)
                tensors.append(name)
        self.together = {path: Together(spec, tensors) for path, (spec, tensors) in found.items()}
        """The arrays of several tensors, by their paths."""

    def place(self, name: str, slot: str) -> Location:
        """Where an accumulator is."""
        if self._places:
            return self._places[name, slot]
        return Location(node(slot, name), None, self._slots[name][slot])

    @property
    def groups(self) -> list[str]:
        """The paths of the groups: the root, and one for each slot."""
        return ["", *sorted({names.encode(slot) for slots in self._slots.values() for slot in slots})]

    def metadata(self, name: str, slot: str) -> bytes:
        """The zarr.json of the array that has one accumulator of one tensor."""
        return arrays.metadata(self._slots[name][slot], {"name": name})

    def places(self) -> Iterator[Location]:
        """Where every accumulator of every tensor is."""
        for name, mine in self._slots.items():
            for slot in mine:
                yield self.place(name, slot)
