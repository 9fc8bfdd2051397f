"""What is written into a new generation, tensor by tensor, on what the generation before has of each. How a generation
begins and ends is the matter of transaction.py, and of attempts.py where another process writes a part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

from continual.lazily import numpy as np
from continual.state import arrays
from continual.state.arrays import Array
from continual.state.draft import Draft
from continual.state.durable import environment
from continual.state.format import Format
from continual.state.generation import Generation, named


class Writing:
    """Reads tensors of the generation `before` (None: zeros) and writes them anew into `draft`. Threads may share it,
    as long as each tensor is one thread's."""

    def __init__(self, draft: Draft, form: Format, before: Generation | None) -> None:
        self._draft = draft
        self._form = form
        self._before = before

    def read(self, name: str, slot: str, into: Array | None = None) -> Array:
        """The accumulator as it was before this fold, writable; zeros before the first. Freshly allocated unless it is
        read into an array of the slot's shape and dtype."""
        if self._before is None:
            return arrays.nothing(self._form.slots[name][slot], into)
        with environment(f"cannot read tensor {name}"):
            return self._before.read(name, slot, into)

    def before(self, name: str, count: int) -> Iterator[dict[str, Array]]:
        """The accumulators of a tensor as `read` gives them, in `count` parts, flat and one after the other."""
        if self._before is not None:
            yield from self._before.parts(name, count)
            return
        for _ in range(count):
            slots = self._form.slots[name].items()
            yield {slot: np.zeros(math.prod(spec.shape) // count, spec.dtype) for slot, spec in slots}

    def write(self, name: str, slot: str, array: Array) -> None:
        """The accumulator after this fold: an array of exactly the slot's shape and dtype."""
        with environment(f"cannot write tensor {name}"):
            place = self._form.layout.place(name, slot)
            stem = self._draft.ready(place, name, slot)
            self._draft.receive(place, arrays.write(stem, place.spec, array))

    def read_rows(self, name: str, slot: str, start: int, stop: int) -> Array:
        """Rows of an accumulator as they were before this fold, where its slot has `rows`; zeros where there is
        nothing."""
        if self._before is None:
            return np.zeros((stop - start, *self._form.slots[name][slot].shape[1:]), np.float32)
        return self._before.read_rows(name, slot, start, stop)

    def write_rows(self, name: str, slot: str, start: int, values: Array) -> None:
        """The accumulator after this fold, where its slot has `rows`: up to the row `start` as it was, from there on
        `values`, and nothing behind them. Chunks that end before `start` are hard links."""
        place = self._form.layout.place(name, slot)
        spec = place.spec
        assert spec.rows is not None, "a slot with rows"
        assert values.shape[1:] == spec.shape[1:], (values.shape, spec)
        linked = start // spec.rows
        begun = linked * spec.rows
        last = math.ceil((start + len(values)) / spec.rows)
        with environment(f"cannot write tensor {name}"):
            stem = self._draft.ready(place, name, slot)
            chunks: list[str] = []
            if linked:
                assert self._before is not None, "rows that stay are of a generation before"
                chunks += self._before.chunks(place)[:linked]
                with named(name, place):
                    self._draft.take(place.files(linked))
            if begun < start:
                values = np.concatenate([self.read_rows(name, slot, begun, start), values])
            with closing(arrays.Writer(stem, spec, range(linked, last))) as writer:
                writer.write(arrays.raw(np.ascontiguousarray(values)))
                chunks += writer.finish()
            self._draft.receive(place, chunks, linked)

    def runs(self, name: str, length: int) -> Iterator[tuple[int, int, dict[str, Array]]]:
        """Rewrites a tensor whose accumulators all have its shape, in flat runs of at most `length` elements, so that
        no more is in memory.

        Yields (first element, one past the last, accumulators by slot) as they were before this fold, zeros before the
        first. What the caller leaves in the arrays is written when it asks for the next; it has to go on to the end.
        """
        numel = math.prod(next(iter(self._form.slots[name].values())).shape)
        steps = [(start, min(start + length, numel)) for start in range(0, numel, length)]
        lengths = [dict.fromkeys(self._form.slots[name], stop - start) for start, stop in steps]
        for (start, stop), values in zip(steps, self._rewritten(name, lengths), strict=True):
            yield start, stop, values

    def parts(self, name: str, count: int) -> Iterator[dict[str, Array]]:
        """Rewrites a tensor in `count` parts, one after the other, so that no more than one is in memory: of every
        accumulator a part of its elements, flat. Used as `runs`."""
        lengths = {slot: math.prod(spec.shape) // count for slot, spec in self._form.slots[name].items()}
        yield from self._rewritten(name, [lengths] * count)

    def _rewritten(self, name: str, steps: Sequence[Mapping[str, int]]) -> Iterator[dict[str, Array]]:
        """The accumulators of a tensor in flat pieces, each step so many elements of each."""
        slots = self._form.slots[name]
        places = {slot: self._form.layout.place(name, slot) for slot in slots}
        with ExitStack() as files, environment(f"cannot rewrite tensor {name}"):
            readers = (
                {slot: files.enter_context(closing(self._before.reader(name, slot))) for slot in slots}
                if self._before
                else {}
            )
            writers = {
                slot: files.enter_context(closing(arrays.Writer(self._draft.ready(place, name, slot), place.spec)))
                for slot, place in places.items()
            }
            buffers = {slot: np.zeros(steps[0][slot] if steps else 0, spec.dtype) for slot, spec in slots.items()}
            for step in steps:
                values = {slot: buffer[: step[slot]] for slot, buffer in buffers.items()}
                for slot, value in values.items():
                    if self._before:
                        readers[slot].read(arrays.raw(value))
                    else:
                        value.fill(0)
                yield values
                for slot, value in values.items():
                    writers[slot].write(arrays.raw(value))
            for slot, writer in writers.items():
                self._draft.receive(places[slot], writer.finish())

    def keep(self, name: str) -> None:
        """The tensor did not change: its files are hard links to those of the generation before; zeros where there is
        none.

        What was written for it in this transaction is dropped. What has no arrays gets none.
        """
        if self._before is None or not self._before.has(name):
            self.clear(name)
            return
        for slot in self._form.slots[name]:
            place = self._form.layout.place(name, slot)
            self._draft.drop(place)
            with environment(f"cannot write tensor {name}"), named(name, place):
                self._draft.keep(place)

    def clear(self, name: str) -> None:
        """All that is kept of the tensor is zeros from here on: where arrays may be missing, it has none. What was
        written for it in this transaction is dropped."""
        for slot in self._form.slots[name]:
            place = self._form.layout.place(name, slot)
            self._draft.drop(place)
            if self._form.sparse:
                continue
            with environment(f"cannot write tensor {name}"):
                stem = self._draft.ready(place, name, slot)
                self._draft.receive(place, arrays.write_zeros(stem, place.spec))

    def square(self, name: str) -> float | None:
        """`Generation.square` of the tensor before this fold."""
        return 0.0 if self._before is None else self._before.square(name)

    def rank(self, name: str) -> int | None:
        """`Generation.rank` of the tensor before this fold."""
        return 0 if self._before is None else self._before.rank(name)
