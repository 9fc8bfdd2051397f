"""What the figures of a fold mean, in sentences for who does not know the formulas."""

from __future__ import annotations

from collections.abc import Iterator

from continual.outside import counted
from continual.service.web.recalled import AboutFold
from continual.texts import share

_APART = 0.1
"""Cosines nearer to zero than this are of directions that have little to do with each other."""


def of_fold(about: AboutFold) -> Iterator[str]:
    """A sentence for each thing that a fold measured."""
    yield from _length(about)
    yield from _direction(about)
    yield from _kept(about)
    yield from _part_of_today(about)
    yield from _tensors(about)


def _length(about: AboutFold) -> Iterator[str]:
    norm = about.fold.shown.tau_norm
    if norm is None:
        return
    told = f"Norm {norm:.4g}: how long its task vector is, which is all that training changed"
    if about.base_norm:
        told += f"; that is {share(norm / about.base_norm)} of the length of the base's weights"
    yield told + "."
    if about.mean_norm:
        yield f"That is {norm / about.mean_norm:.2f} times the mean length of the models in the merge."


def _direction(about: AboutFold) -> Iterator[str]:
    cosine = about.fold.shown.cosine
    if cosine:  # of the first fold it is 0, as there was nothing before
        if abs(cosine) < _APART:
            meaning = "it changes what the others left alone, and hardly gets in their way"
        elif cosine > 0:
            meaning = "a part of what it brings was in the merge already"
        else:
            meaning = "it takes back a part of what others brought: they get in each other's way"
        yield f"Cosine {cosine:+.3f} with the merge before it: {meaning}."
    if about.overlap is not None:
        yield (
            f"Of a few matrices, {share(about.overlap)} of its energy lies along the leading directions of the merge "
            "before it."
        )
    if about.conflict is not None:
        yield f"Interference: in {share(about.conflict)} of what it changes the merge before it had the other sign."
    if about.fold.merged_norm is not None:
        yield f"After it the merged task vector was {about.fold.merged_norm:.4g} long."


def _kept(about: AboutFold) -> Iterator[str]:
    shown = about.fold.shown
    if shown.cut is not None:
        now = "" if shown.cut_now is None else f", and {share(shown.cut_now)} by now"
        yield f"{share(shown.cut)} of its energy was cut off to make room when it came{now}."
    elif about.fold.kept is not None:
        yield f"The rule kept {share(about.fold.kept)} of its energy; the rest lay where others were already."


def _part_of_today(about: AboutFold) -> Iterator[str]:
    weight = about.fold.shown.weight
    if about.weight_share is not None:
        told = "1" if weight is None else f"{weight:.3g}"
        yield f"It was folded with weight {told}, which is {share(about.weight_share)} of all weights in the merge now."
    if about.length_share is not None:
        yield f"Today it has {share(about.length_share)} of the lengths of all task vectors in the merge."
    for one in about.out:
        found = one.share
        yield (
            f"In record {one.seq}, which {one.place} has: share {share(found.norm)} of all lengths, cosine "
            f"{found.cosine:+.3f} with the merge, and without it the merge changes by {share(found.change)}."
        )


def _tensors(about: AboutFold) -> Iterator[str]:
    if about.tensors is not None:
        same = f"; {counted(about.unchanged, 'tensor')} stayed as in the base" if about.unchanged else ""
        yield f"It changed {counted(about.tensors, 'tensor')}{same}."
    if about.fold.shown.left_out:
        yield f"Left out, since the base has no such tensors: {about.fold.shown.left_out}."
