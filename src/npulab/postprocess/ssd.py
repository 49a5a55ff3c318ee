"""TFLite's TFLite_Detection_PostProcess in NumPy alone.

Source: what LiteRT's own kernel computes (tensorflow/lite/kernels/detection_postprocess.cc), operation by operation:
boxes decoded in float64 and rounded to float32, suppression in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from npulab.postprocess.boxes import Array, best_first, greedy


def ssd_boxes(codes: Array, anchors: Array, scales: Sequence[float]) -> Array:
    """Corners (N, 4: top, left, bottom, right) of codes (N, 4 or more: y, x, h, w) at anchors (N, 4: y, x, h, w)."""
    t, a = codes[:, :4].astype(np.float64), anchors.astype(np.float64)
    s = np.array(scales, np.float32).astype(np.float64)
    centre = (t[:, :2] / s[:2] * a[:, 2:] + a[:, :2]).astype(np.float32)
    half = (0.5 * np.exp(t[:, 2:] / s[2:]) * a[:, 2:]).astype(np.float32)
    return np.concatenate([centre - half, centre + half], 1)


def ssd(outputs: Mapping[str, Array], *, boxes: str, scores: str, anchors: Array,
        scales: Sequence[float], classes: int, most: int, per_box: int, per_class: int, score: float, iou: float,
        regular: bool, results: Sequence[str]) -> dict[str, Array]:
    """The operator's four outputs: boxes (1, K, 4: top, left, bottom, right), classes (1, K), scores (1, K), and how
    many of the K = `most` x `per_box` rows count (1,); the others are 0.

    regular  suppression class by class, at most `per_class` of each; otherwise by each box's best class alone, and a
             box that stays gives its `per_box` best classes.
    """
    corners = ssd_boxes(outputs[boxes][0], anchors, scales)
    columns = outputs[scores][0].astype(np.float32, copy=False)
    columns = columns[:, columns.shape[1] - classes :]  # a class before them is the background
    least = np.float32(score)
    if regular:
        kinds, rows = np.nonzero((columns >= least).T)
        order = best_first(columns[rows, kinds])
        order = order[greedy(corners[rows[order]], kinds[order], iou, most, per_class)]
        chosen, kinds = rows[order], kinds[order]
        per_box = 1
    else:
        best = columns.max(1)
        (rows,) = np.nonzero(best >= least)
        rows = rows[best_first(best[rows])]
        rows = rows[greedy(corners[rows], np.zeros(len(rows), np.intp), iou, most)]
        wide = min(per_box, classes)
        top = columns[rows].argmax(1)[:, None] if wide == 1 else np.argsort(-columns[rows], 1, kind="stable")[:, :wide]
        chosen, kinds = np.repeat(rows, wide), top.reshape(-1)
    count = len(chosen)
    found = [np.zeros((1, most * per_box, 4), np.float32), np.zeros((1, most * per_box), np.float32),
             np.zeros((1, most * per_box), np.float32)]
    for array, values in zip(found, (corners[chosen], kinds, columns[chosen, kinds]), strict=True):
        array[0, :count] = values
    return dict(zip(results, (*found, np.array([len(order) if regular else len(rows)], np.float32)), strict=True))
