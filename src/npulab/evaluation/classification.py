"""Top-1 and top-5."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError, UsageError
from npulab.evaluation.types import Array, Evaluation, Progress, Run
from npulab.quantization.types import Feeds

IMAGENET = 1000
Z = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, Probable inference, J. Am. Stat. Assoc. 22). (0, 1) of nothing."""
    if not of:
        return 0.0, 1.0
    share, z = right / of, Z * Z / of
    centre, half = share + z / 2, Z * math.sqrt((share * (1 - share) + z / 4) / of)
    return max(0.0, (centre - half) / (1 + z)), min(1.0, (centre + half) / (1 + z))


def top1(run: Run, samples: Iterable[Feeds], labels: Sequence[int] | NDArray[np.int64], offset: int | None = None,
         known: int | None = None, progress: Progress | None = None) -> Evaluation:
    """The network `run` on samples of which each has a label, a class from 0.

    offset  what the network's class is above the label's; None: found as `offset_of` does, with `known` labels.

    Of equal scores the first counts as the best. A score that is no number counts as the least.

    Raises: UnsupportedError if the output is not one row of scores; UsageError if the network has no class of a label.
    """
    truth = np.asarray(labels, np.int64)
    best = np.full((len(truth), 5), -1, np.int64)
    note, count, shift = "", 0, offset
    for i, feed in enumerate(samples):
        if i >= len(truth):
            raise UsageError("there are more samples than labels", got=f"{len(truth)} labels")
        row = scores(run(feed))
        if not count:
            if shift is None:
                shift, note = offset_of(len(row), truth, known)
            _fits(len(row), truth, shift)
        count = i + 1
        order = np.argsort(np.where(np.isnan(row), np.inf, -row), kind="stable")[:5]
        best[i, : len(order)] = np.where(np.isnan(row[order]), -1, order - (shift or 0))
        if progress:
            progress(count, len(truth))
    if count < len(truth) or not count:
        raise UsageError("there are fewer samples than labels" if count else "there are no samples",
                         got=f"{count} samples, {len(truth)} labels")
    best = np.maximum(best, -1)
    hits = best == truth[:, None]
    right = hits[:, 0]
    return Evaluation("top-1", float(right.mean()), count, best[:, 0], truth, right, hits.any(1), shift or 0,
                      names=range(count), notes=(note,) if note else ())


def scores(outputs: Mapping[str, Array] | Array) -> NDArray[np.float64]:
    """The one row of scores that the outputs hold.

    Raises: UnsupportedError if there is none, or more than one.
    """
    named = outputs if isinstance(outputs, Mapping) else {"output": np.asarray(outputs)}
    rows = [x for x in named.values() if 1 < x.size == max(x.shape, default=0) and x.dtype.kind in "iuf"]
    if len(rows) != 1:
        raise UnsupportedError("the network gives not one row of scores", want="one output of shape 1,CLASSES",
                               got="; ".join(f"{n}: {x.dtype}{list(x.shape)}" for n, x in named.items())[:400])
    return rows[0].reshape(-1).astype(np.float64)


def offset_of(outputs: int, labels: NDArray[np.int64], known: int | None) -> tuple[int, str]:
    """What the network's class is above the label's, and a sentence on it: 1 where it has a class more than there are
    labels, or 1001 for ImageNet's 0..999, because its class 0 then is the background.

    known  how many labels there are, if that is known; `labels` are perhaps only some of them.
    """
    if known is None:
        known = IMAGENET if outputs == IMAGENET + 1 and labels.max(initial=0) < IMAGENET else outputs
    if outputs == known + 1:
        return 1, f"{outputs} outputs for {known} classes: class 0 taken as background, label k is class k + 1"
    return 0, "" if outputs == known else f"{outputs} outputs for {known} classes: are they the same ones?"


def _fits(outputs: int, labels: NDArray[np.int64], offset: int) -> None:
    if offset >= outputs:
        raise UsageError(f"an offset of {offset} leaves none of the network's {outputs} outputs a label",
                         try_=f"an offset below {outputs}; 1 with a background class")
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0 or low + offset < 0 or high + offset >= outputs:
        raise UsageError("the labels are not classes of this network",
                         want=f"labels {max(0, -offset)}..{outputs - 1 - offset} for its {outputs} outputs",
                         got=f"{low}..{high}", try_="--offset, or --classes with the network's own order")
