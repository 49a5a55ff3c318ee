"""What was measured, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.quantization.types import Feeds

Array = NDArray[Any]
Run = Callable[[Feeds], Mapping[str, Array] | Array]
"""A network: its outputs by name, or its only output, for one sample."""
Progress = Callable[[int, int], None]
"""Is told how many samples are done, and of how many."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a network did.

    metric       "top-1" (a share), or "AP" (COCO's: mean over overlaps 0.5..0.95 and classes).
    value        from 0 to 1.
    samples      how many were run.
    predictions  top-1: the class of each sample in the labels' numbers, -1 where there was none (a background class, or
                 no number among the scores). AP: rows of image id, left, top, width, height, score, category id.
    labels       top-1: the class of each sample. None for AP.
    correct      top-1: whether each sample was right, for paired comparisons. None for AP.
    in_five      top-1: whether the label was among the five best.
    offset       top-1: what the network's class is above the label's: 1 where its class 0 is the background.
    ap50         AP at an overlap of 0.5 alone.
    names        of the samples.
    device, how  what ran the network; what was done to each sample.
    notes        for people.
    """

    metric: str
    value: float
    samples: int
    predictions: Array
    labels: NDArray[np.int64] | None = None
    correct: NDArray[np.bool_] | None = None
    in_five: NDArray[np.bool_] | None = None
    offset: int = 0
    ap50: float | None = None
    names: Sequence[str] | Sequence[int] = ()
    model: str = ""
    data: str = ""
    device: str = ""
    how: str = ""
    notes: tuple[str, ...] = ()

    @property
    def top5(self) -> float | None:
        """The share of samples whose label is among the five best; None for AP."""
        return None if self.in_five is None else float(self.in_five.mean())

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of top-1; None for AP."""
        from npulab.evaluation.classification import wilson

        return None if self.correct is None else wilson(int(self.correct.sum()), self.samples)

    def as_data(self) -> dict[str, Any]:
        """For JSON, without what is known of each sample."""
        found: dict[str, Any] = {"metric": self.metric, "value": self.value, "samples": self.samples}
        if self.correct is not None:
            found |= {"top5": self.top5, "interval": self.interval, "class_offset": self.offset}
        if self.ap50 is not None:
            found |= {"ap50": self.ap50}
        return found | {"model": self.model, "data": self.data, "device": self.device, "how": self.how,
                        "notes": list(self.notes)}
