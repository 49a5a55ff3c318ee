"""How well a network does on labelled data, whatever runs it: top-1 of classifiers, AP of detectors."""

from __future__ import annotations

from npulab.evaluation.classification import top1, wilson
from npulab.evaluation.devices import open_device
from npulab.evaluation.measure import evaluate
from npulab.evaluation.types import Evaluation

__all__ = ["Evaluation", "evaluate", "open_device", "top1", "wilson"]
