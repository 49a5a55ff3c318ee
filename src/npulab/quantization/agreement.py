"""How often the integer network names the same class as the float one, from the noise of its outputs alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from npulab.program.pages import Buffer
from npulab.quantization.emit import integer_model
from npulab.quantization.network import Network
from npulab.quantization.parts import each
from npulab.quantization.types import Array, Samples

RIVALS = 32
"""Classes behind the first that may overtake it; further ones lie lower."""
NODES = 31
"""Of the quadrature over the first class's own noise."""
TABLE = 8.0
"""Standard deviations that the normal distribution is tabulated for, each side."""


def noise_power(logits: Array, other: Array) -> float:
    """The variance of the noise of another network's outputs (n, classes): of what differs from the float network's
    once those are brought to the same strength, as noise on the way weakens answers; without what all classes of a
    sample have in common, which moves no class past another. Unbiased for noise that is independent by class.

    Infinite if the two have nothing in common.
    """
    x, y = (z - z.mean(axis=1, keepdims=True) for z in (np.asarray(logits, np.float64), np.asarray(other, np.float64)))
    gain = float(np.vdot(x, y)) / max(float(np.vdot(x, x)), 1e-300)
    if gain <= 0:
        return math.inf
    return float(np.sum((y / gain - x) ** 2) / max(1, x.shape[0] * (x.shape[1] - 1)))


def predicted_agreement(logits: Array, ratio: float) -> float:
    """The same share from noise over signal alone, as sensitivities add up to it."""
    return expected_agreement(logits, ratio * float(np.mean(np.asarray(logits, np.float64) ** 2)))


def agreement(logits: Array, other: Array) -> float:
    """The share of samples whose largest output is the same."""
    return float(np.mean(np.argmax(logits, axis=1) == np.argmax(other, axis=1)))


def agreeing(reference: Buffer, name: str, samples: Samples) -> Callable[[Network], float]:
    """A score of networks that needs no labels: how often the tensor `name` is largest in the same place as in the
    float network's file."""
    def answers(model: Buffer) -> Array:
        return np.array([int(np.argmax(x)) for x in each(model, [name], samples, lambda arrays: arrays[0])])

    true = answers(reference)
    return lambda net: float(np.mean(answers(integer_model(net)) == true))


def expected_agreement(logits: Array, noise_power: float) -> float:
    """The share of samples (n, classes) whose largest output stays the largest under Gaussian noise of this variance,
    independent by class: the mean over the samples of E[prod Phi((margin + e) / sigma)], e the first class's own noise.

    `logits`  in front of a softmax, of the float network.

    Within a point or so of what is measured where outputs are at 15 dB and more; too high below 10 dB, where the noise
    of one class is not independent of the next one's.
    """
    x = np.asarray(logits, np.float64)
    n, classes = x.shape
    if not n or classes < 2 or noise_power <= 0:
        return 1.0
    if math.isinf(noise_power):
        return 1.0 / int(classes)
    rivals = min(RIVALS, classes - 1)
    top = -np.partition(-x, rivals, axis=1)[:, : rivals + 1]
    top = -np.sort(-top, axis=1)
    margins = (top[:, :1] - top[:, 1:]) / math.sqrt(noise_power)
    at, weight = np.polynomial.hermite_e.hermegauss(NODES)  # of exp(-t^2 / 2)
    chance = np.ones((n, NODES))
    for k in range(rivals):
        chance *= _normal(margins[:, k : k + 1] + at)
    return float(np.mean(chance @ (weight / math.sqrt(2 * math.pi))))


def _normal(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The normal distribution function, to 1e-7, between tabulated points."""
    return np.asarray(np.interp(x, _AT, _VALUES), np.float64)


_AT = np.linspace(-TABLE, TABLE, 8001)
_VALUES = np.array([0.5 * math.erfc(-t / math.sqrt(2)) for t in _AT])
