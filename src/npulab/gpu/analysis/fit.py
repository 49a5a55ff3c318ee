"""The size of a cache by times of a chase around it, as random replacement or sets make them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.analysis.kept import missed, overfilled

Array = NDArray[np.float64]
WAYS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
NEAR = 1.4  # times `after`, where what lies farther does not fit
GOOD = 0.006  # scatter that noise makes; more may be something that is not in the model
SHARED = 0.002  # of a reference clock: errors that neighbours share and no scatter shows
BOUND = 16.0  # 4 standard deviations of one parameter, squared
CHANCE = 9.0  # of a sum of squares: what the end of translation must explain, one of several ends does by chance


@dataclass(frozen=True, slots=True)
class Fit:
    """size, low, high: lines. ways: of a set; 0: any line anywhere, random replacement. noise: relative scatter that is
    left. rounds: bytes, the round sizes that the times allow. edge: the best size is the first or last looked at."""

    size: float
    low: float
    high: float
    ways: int
    noise: float
    rounds: tuple[int, ...]
    edge: bool


def fit(lines: Sequence[int], passes: Sequence[Array], after: int, line: int, share: float) -> Fit:
    """passes: seconds of a load of so many lines; each pass has plateaus of its own, as memory may have another clock
    than the cores, and all have one size. after: lines at 0.4 of the rise. The buffer of translations may end at any
    power of two bytes among the lines, with `share` seconds more a load from there on.
    """
    n = np.array(lines, np.float64)
    reaches = [1 << i for i in range(12, 31) if n[0] * line <= 1 << i < n[-1] * line] if share else []
    ends: list[Array] = [np.where(n * line > reach, share, 0.0) for reach in (*reaches, math.inf)]
    models = _models(tuple(lines), after)
    noise, total = _sums(models, passes, ends, n > 0)
    if noise > GOOD:  # something else may begin beyond: translation, or the next level
        closer, less = _sums(models, passes, ends, n < NEAR * after)
        if closer < noise / 2:
            noise, total = closer, less
    best = int(total.argmin())
    at = best % total.shape[2]
    allowed = (total < total.min() + BOUND).any(axis=(0, 1))
    sizes = _sizes(after)
    step = float(sizes[1] / sizes[0])  # the grid's
    low, high = float(sizes[allowed].min()) / step, float(sizes[allowed].max()) * step
    rounds = tuple(r for r in round_sizes(low * line, high * line)
                   if allowed[np.abs(sizes * line / r - 1) < step - 1].any())
    model = best // total.shape[2] % total.shape[1]
    return Fit(float(sizes[at]), low, high, WAYS[model - 1] if model else 0, noise, rounds, at in (0, len(sizes) - 1))


def _sizes(after: int) -> Array:
    return after * np.geomspace(0.6, 1.2, 1601)


@lru_cache(2)
def _models(lines: tuple[int, ...], after: int) -> Array:
    """Misses by model, size and lines."""
    sizes = _sizes(after)
    random = np.array([[missed(k / s) for k in lines] for s in sizes])
    return np.stack([random, *(overfilled(np.array(lines) / sizes[:, None], w) for w in WAYS)])


def _sums(models: Array, passes: Sequence[Array], ends: Sequence[Array], among: NDArray[np.bool_]
          ) -> tuple[float, Array]:
    """(scatter of the best pass, squares of misfits in standard deviations by end of translation, model and size). A
    pass that was disturbed scatters by itself, and counts for less."""
    total, noise = np.zeros((len(ends), *models.shape[:2])), math.inf
    for times in passes:
        errors = np.stack([np.stack([_misfits(m[:, among], (times - end)[among]) for m in models]) for end in ends])
        scatter = math.sqrt(float(errors.min()) / max(1, int(among.sum()) - 3))
        total += errors / (scatter**2 + SHARED**2)
        noise = min(noise, scatter)
    total[:-1] += CHANCE
    return noise, total


def _misfits(misses: Array, times: Array) -> Array:
    """Sums of squared relative errors of the best low + (high - low) m, for each row m of `misses`."""
    weight = 1 / times
    a, b = (1 - misses) * weight, misses * weight  # both plateaus' shares, relative
    aa, ab, bb = (a * a).sum(1), (a * b).sum(1), (b * b).sum(1)
    ya, yb = a.sum(1), b.sum(1)
    determinant = np.maximum(aa * bb - ab * ab, 1e-9 * (aa + bb) ** 2)  # of one plateau alone: none fits
    low, high = (ya * bb - yb * ab) / determinant, (yb * aa - ya * ab) / determinant
    found: Array = ((low[:, None] * a + high[:, None] * b - 1) ** 2).sum(1)
    return np.where((high > low) & (low > 0), found, np.inf)


def round_sizes(low: float, high: float) -> list[int]:
    """Sizes in low..high as caches of GPUs are built: an odd number up to 31, times a power of two.

    48 KiB is 3 * 2^14, A100's 40 MiB 5 * 2^23, H100's 50 MiB 25 * 2^21 (NVIDIA, Hopper Architecture In-Depth). Not so:
    a processor of 26 slices of 1.375 MiB, 143 * 2^18."""
    return sorted(k << n for k in range(1, 32, 2) for n in range(5, 30) if low <= k << n <= high)
