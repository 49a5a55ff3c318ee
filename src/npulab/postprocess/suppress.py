"""ONNX's NonMaxSuppression in NumPy alone. Source: its text in the ONNX operator specification, version 11."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npulab.postprocess.boxes import best_first, greedy, turned


def nms(outputs: Mapping[str, Any], *, boxes: str, scores: str, centred: bool, most: int, iou: float,
        score: float | None, result: str) -> dict[str, Any]:
    """(batch, class, box) of each box that stays, int64 (K, 3): class by class, the best first.

    centred  boxes are x, y, width, height instead of two corners, of which the specification lets either come first.
    """
    found = []
    for batch, (rows, columns) in enumerate(zip(outputs[boxes], outputs[scores], strict=True)):
        corners = turned(rows, "xyxy") if centred else np.concatenate(
            [np.minimum(rows[:, :2], rows[:, 2:]), np.maximum(rows[:, :2], rows[:, 2:])], 1)
        kinds, places = np.nonzero(columns > (-np.inf if score is None else columns.dtype.type(score)))
        order = best_first(columns[kinds, places])
        order = order[greedy(corners[places[order]], kinds[order], iou, None, most)] if most > 0 else order[:0]
        order = order[np.argsort(kinds[order], kind="stable")]
        found.append(np.stack([np.full(len(order), batch), kinds[order], places[order]], 1))
    return {result: np.concatenate(found).astype(np.int64)}
