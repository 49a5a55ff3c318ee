"""Learned rounding of weights without gradients of a network: AdaRound's problem, layer by layer, from second moments.

AdaRound (Nagel et al. 2020, arXiv:2004.10568) rounds each weight up or down so that a layer's results, not its weights,
stay near. Without the clamp behind the layer that error is a quadratic form (`gram.py`), so that no sample need be seen
again. Scales are chosen with the rounding: each of several clipped ranges is rounded, the best one kept.

    sequential  a weight at a time, the later ones making up for the errors of the earlier ones (GPTQ, Frantar et al.
                2022, arXiv:2210.17323; as Babai's nearest plane: Chen et al. 2025, arXiv:2507.18553)
    descent     then, below 8 bits, moves of single weights as long as one helps (as CDQuant does, Nair & Suggala
                2024, arXiv:2406.17542), scales refitted in between
    pairs       then two weights of a row at once, where no single move helps any more
    relaxed     AdaRound's own: rectified sigmoids between down and up, driven to 0 and 1, by Adam. It takes twice as
                long and leaves 2 to 3 dB more noise, for it cannot go beyond down and up; it is here to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UsageError
from npulab.quantization.calibrate import roomy
from npulab.quantization.gram import Moments, Reference, grouped, moments, moments_bytes, reference
from npulab.quantization.network import Layer, Network
from npulab.quantization.ranges import LEAST_SCALE
from npulab.quantization.rounding_brief import BITS, DAMPING, FEWER, ranges_tried, round_briefly
from npulab.quantization.rounding_brief import SHARES as BRIEF_SHARES
from npulab.quantization.session import Progress
from npulab.quantization.types import Array, Params, Samples, Scheme

Floats = NDArray[Any]
Solver = Literal["descent", "relaxed"]
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4)
"""Of the weights' range, that scales are tried for."""
SWEEPS = 50
REFITS = 4
CANDIDATES = 24
PAIR_ROUNDS = 100
BLOCK = 64
STAGE_BYTES = 1 << 28
"""Second moments that are held at once."""
GRIDS_BYTES = 1 << 22
"""Weights in all grids that are rounded in one go; larger layers a grid at a time."""
WORKERS = 2
"""Layers that are rounded side by side."""
ITERATIONS = 1000
"""Of the relaxed solver."""


def adaround(net: Network, samples: Samples, passes: int = 1, solver: Solver = "descent", scales: bool = True,
             aim: Reference | None = None, progress: Progress | None = None) -> list[str]:
    """Rounding (`layer.codes`), scales and biases of all integer layers that have params.

    passes  1: layers see the float network's tensors as integers (fast). More: layers in so many groups, each one
            seeing what the network makes with the groups before it rounded; 0: a group for each depth.
    scales  may change as well.       aim  the float network, where the layers' biases are no longer its own.

    Returns: a note for each layer: noise of its results against the float network's, in dB, before and after.
    Raises: UsageError without samples, for another solver, for numbers beyond gram.LARGEST; ModelError for tensors
    that are not finite.
    """
    if solver not in ("descent", "relaxed"):
        raise UsageError(f"there is no solver '{solver}' of roundings", want="descent or relaxed")
    aim = aim or reference(net)
    layers = [layer for layer in net.layers if layer.scheme is not None and layer.params is not None]
    from threadpoolctl import threadpool_limits

    for layer in layers:
        layer.codes = None
    if layers and passes == 1 and solver == "descent" and all(_is_brief(layer) for layer in layers):
        return round_briefly(net, layers, samples, aim, scales, progress)
    notes: list[str] = []
    for group in [layers] if passes == 1 else staged(net, layers, passes):
        for part in _within(group):
            found = moments(net, part, samples, aim, passes != 1, progress)
            biases = [aim.biases[net.layers.index(m.layer)] for m in found]
            with threadpool_limits(1, "blas"), ThreadPoolExecutor(WORKERS) as pool:  # sums in one order
                notes += pool.map(lambda m, b: round_layer(net, m, b, solver, scales), found, biases)
            found.clear()
    return notes


def staged(net: Network, layers: Sequence[Layer], passes: int) -> list[list[Layer]]:
    """Layers by how many layers lie before them at most, in `passes` groups at most (0: no limit)."""
    by_node = {layer.node: layer for layer in layers}
    depth: dict[int, int] = {}
    at: dict[int, int] = {}
    for n in net.graph.nodes:
        d = max((depth.get(v, 0) for v in n.inputs if v >= 0), default=0)
        if n.index in by_node:
            at[n.index] = d
            d += 1
        depth.update((v, d) for v in n.outputs)
    levels = sorted(set(at.values()))
    count = len(levels) if not passes else min(passes, len(levels))
    group = {level: i * count // len(levels) for i, level in enumerate(levels)}
    found: list[list[Layer]] = [[] for _ in range(count)]
    for layer in layers:
        found[group[at[layer.node]]].append(layer)
    return found


def _is_brief(layer: Layer) -> bool:
    return layer.scheme is not None and layer.scheme.bits >= BITS


def _within(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in order, in parts whose moments hold at most STAGE_BYTES (or one layer)."""
    parts: list[list[Layer]] = [[]]
    held = 0
    for layer in layers:
        size = moments_bytes(layer)
        if parts[-1] and held + size > STAGE_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(layer)
        held += size
    return [p for p in parts if p]


def round_layer(net: Network, m: Moments, bias: Array | None, solver: Solver = "descent", scales: bool = True) -> str:
    """Codes, params and bias of one layer. `bias`: the float network's. Returns: the note."""
    layer = m.layer
    assert layer.params is not None
    assert layer.scheme is not None
    centred = layer.bias is not None or layer.kind != "matmul"
    weight = grouped(layer).astype(m.second.dtype)
    problem = _problem(m, weight, centred)
    old = _grid(layer, layer.params)
    before = problem.error(_seen(nearest(weight, old), old))
    codes, grid = _solve(net, layer, problem, weight, solver, scales)
    after = problem.error(_seen(codes, grid))
    layer.params = grid.params
    layer.codes = layer.from_rows(codes.reshape(layer.channels, -1)).astype(layer.scheme.holder)
    if centred:
        start = np.zeros(layer.channels) if bias is None else bias.astype(np.float64)
        layer.bias = (start + m.drift(grouped(layer, layer.seen))).astype(np.float32)
    signal = max(float(problem.power.sum()), 1e-30)
    return (f"{layer.name}: noise {_db(float(before.sum()) / signal)} -> {_db(float(after.sum()) / signal)} dB")


def _problem(m: Moments, weight: Floats, centred: bool) -> Problem:
    """The layer's; its sums are gone then."""
    blur = m.blur()
    made = m.covariances(centred)
    m.forget()
    return Problem.of(weight, *made, blur)


def _db(ratio: float) -> str:
    return f"{10 * np.log10(max(ratio, 1e-30)):.1f}"


class Problem:
    """Rounding of rows (groups, R, K): the least (q - target) H (q - target)^T beside what no rounding changes.

    `target` is the float row that, reading what the integer network reads, comes nearest to the float results.
    """

    def __init__(self, second: Floats, target: Floats, variances: Floats, cross: Floats, power: Floats) -> None:
        """`second` with what is added to its diagonal, which was `variances`."""
        self.second, self.target, self.variances, self.cross, self.power = second, target, variances, cross, power

    @classmethod
    def of(cls, weight: Floats, second: Floats, cross: Floats, power: Floats, blur: Floats | float = 0.0) -> Problem:
        """`weight` (groups, R, K), covariances (groups, K, K), power (groups * R,), `blur` of the variances: what they
        may be off by (groups,)."""
        k = second.shape[1]
        mean = np.trace(second, axis1=1, axis2=2) / k
        damp = np.maximum(DAMPING * mean, blur + 1e-9 * mean.max() + 1e-30)[:, None] * np.ones(k, second.dtype)
        variances = np.diagonal(second, axis1=1, axis2=2).copy()
        damped = second.copy()
        damped[:, np.arange(k), np.arange(k)] += damp.astype(second.dtype)
        mixed = weight @ cross
        right = mixed + weight * damp[:, None, :].astype(second.dtype)
        target = np.linalg.solve(damped, right.transpose(0, 2, 1)).transpose(0, 2, 1)
        return cls(damped, np.ascontiguousarray(target), variances, mixed, power)

    def error(self, seen: Floats) -> NDArray[np.float64]:
        """Mean squared difference of the results, (channels,), of weights (groups, R, K)."""
        linear = np.einsum("grk,grk->gr", seen, self.cross, dtype=np.float64)
        exact, lanes = self.second.copy(), np.arange(seen.shape[2])
        exact[:, lanes, lanes] = self.variances
        square = np.einsum("grk,grk->gr", seen @ exact, seen, dtype=np.float64)
        return np.asarray(self.power - 2 * linear.ravel() + square.ravel())

    @cached_property
    def factor(self) -> tuple[NDArray[np.intp], Floats]:
        """(weights of a channel by the variance that they read, ascending; upper triangle U, H = U^T U so sorted)."""
        h = self.second
        order = np.argsort(np.diagonal(h, axis1=1, axis2=2), axis=1, kind="stable")
        lanes = np.arange(len(h))[:, None, None]
        lower = np.linalg.cholesky(h[lanes, order[:, :, None], order[:, None, :]])
        return order, np.ascontiguousarray(lower.transpose(0, 2, 1))

    def cost(self, off: Floats) -> Floats:
        """off H off^T of each row."""
        return np.asarray(np.einsum("grk,grk->gr", off @ self.second, off))


class Grid:
    """What integers stand for: scale and zero point of each row, (groups, R, 1), and the limits."""

    def __init__(self, params: Params | None, scheme: Scheme, scale: Floats, zero: Floats) -> None:
        self.made, self.scheme, self.scale, self.zero = params, scheme, scale, zero

    @property
    def params(self) -> Params:
        assert self.made is not None
        return self.made


def _grid(layer: Layer, p: Params) -> Grid:
    shape = (layer.groups, layer.channels // layer.groups, 1)
    dtype = np.float32 if layer.rows().shape[1] >= 1024 else np.float64
    scale = np.broadcast_to(p.scales.astype(dtype), (layer.channels,)).reshape(shape)
    zero = np.broadcast_to(p.zeros.astype(dtype), (layer.channels,)).reshape(shape)
    return Grid(p, p.scheme, scale, zero)


def _seen(codes: Floats, g: Grid) -> Floats:
    return np.asarray((codes - g.zero) * g.scale)


def nearest(target: Floats, g: Grid) -> Floats:
    """The integers nearest to the rows."""
    return np.asarray(np.clip(np.rint(target / g.scale) + g.zero, g.scheme.low, g.scheme.high))


def _solve(net: Network, layer: Layer, problem: Problem, weight: Floats, solver: Solver, scales: bool
           ) -> tuple[Floats, Grid]:
    assert layer.params is not None
    assert layer.scheme is not None
    shares = () if not scales else FEWER if layer.scheme.power_of_two else BRIEF_SHARES if _is_brief(layer) else SHARES
    grids = [_grid(layer, p) for p in ranges_tried(net, layer, weight, shares)]
    together = weight.nbytes * len(grids) <= GRIDS_BYTES
    codes = sequential(problem, grids) if together else np.concatenate([sequential(problem, [g]) for g in grids])
    costs = np.stack([problem.cost(_seen(c, g) - problem.target) for c, g in zip(codes, grids, strict=True)])
    if layer.params.axis is None:
        best = np.broadcast_to(np.argmin(costs.sum(axis=(1, 2))), costs.shape[1:])
    else:
        best = np.argmin(costs, axis=0)
    pick = best[None, :, :, None]
    grid = _merged(layer, grids, best)
    start = np.take_along_axis(codes, pick, axis=0)[0]
    if solver == "descent" and _is_brief(layer):
        return start, grid
    chosen = relaxed(problem, grid) if solver == "relaxed" else best_of(problem, grid, start)
    if scales and not layer.scheme.power_of_two and layer.scheme.symmetric:
        for _ in range(REFITS):
            refitted = _refitted(net, layer, problem, grid, chosen)
            moved = descent(problem, refitted, chosen) if solver != "relaxed" else chosen
            if problem.cost(_seen(moved, refitted) - problem.target).sum() >= \
                    problem.cost(_seen(chosen, grid) - problem.target).sum() * (1 - 1e-4):
                break
            chosen, grid = moved, refitted
    return chosen, grid


def _merged(layer: Layer, grids: Sequence[Grid], best: Array) -> Grid:
    """Of each row, the scale and zero point of its best grid."""
    if len(grids) == 1 or grids[0].params.axis is None:
        return grids[int(best.flat[0])]
    at = best.ravel(), np.arange(best.size)
    p = Params(grids[0].scheme, np.stack([g.params.scales for g in grids])[at],
               np.stack([g.params.zeros for g in grids])[at], grids[0].params.axis)
    return _grid(layer, p)


def _refitted(net: Network, layer: Layer, problem: Problem, g: Grid, codes: Floats) -> Grid:
    """The scales that fit the integers best, zero points as they are."""
    steps = codes - g.zero
    pull = np.einsum("grk,grk->gr", steps @ problem.second, problem.target)
    size = problem.cost(steps)
    if g.params.axis is None:
        pull, size = pull.sum(keepdims=True), size.sum(keepdims=True)
    old = g.params.scales.astype(np.float64)
    fit = np.where(size > 0, pull / np.where(size > 0, size, 1), 0).ravel()
    fit = np.where(fit > old / 4, fit, old)
    scale = np.maximum(fit, LEAST_SCALE).astype(np.float32)
    return _grid(layer, roomy(net, layer, Params(g.scheme, scale, g.params.zeros, g.params.axis)))


def best_of(problem: Problem, g: Grid, start: Floats | None = None) -> Floats:
    """Descent from sequential rounding (`start`) and from the nearest integers, row by row the better one, then pairs
    of weights moved."""
    start = sequential(problem, [g])[0] if start is None else start
    best = _better(problem, g, descent(problem, g, start), descent(problem, g, nearest(problem.target, g)))
    return pairs(problem, g, best)


def _better(problem: Problem, g: Grid, a: Floats, b: Floats) -> Floats:
    """Row by row the better one."""
    wins = problem.cost(_seen(a, g) - problem.target) <= problem.cost(_seen(b, g) - problem.target)
    return np.where(wins[:, :, None], a, b)


def sequential(problem: Problem, grids: Sequence[Grid]) -> Floats:
    """Weights one after another, those that read the greatest variance first, each making up for those before it: the
    integers (grids, groups, R, K)."""
    order, upper = problem.factor
    groups, rows, k = problem.target.shape
    low, high = grids[0].scheme.low, grids[0].scheme.high
    target = np.tile(np.take_along_axis(problem.target, order[:, None, :], axis=2), (1, len(grids), 1))
    scale, zero = (np.concatenate(a, axis=1) for a in zip(*((g.scale[..., 0], g.zero[..., 0]) for g in grids),
                                                          strict=True))
    target = np.ascontiguousarray(target.transpose(0, 2, 1))  # a weight of all rows lies together
    codes, off = np.zeros_like(target), np.zeros_like(target)
    pivots = np.diagonal(upper, axis1=1, axis2=2)
    for end in range(k, 0, -BLOCK):
        begin = max(0, end - BLOCK)
        later = upper[:, begin:end, end:] @ off[:, end:]
        for i in range(end - 1, begin - 1, -1):
            known = later[:, i - begin] + (upper[:, i : i + 1, i + 1 : end] @ off[:, i + 1 : end])[:, 0]
            wish = (target[:, i] - known / pivots[:, i : i + 1]) / scale
            codes[:, i] = np.clip(np.rint(wish) + zero, low, high)
            off[:, i] = (codes[:, i] - zero) * scale - target[:, i]
    del target, off  # as large as the codes
    out = np.empty_like(codes)
    np.put_along_axis(out, order[:, :, None], codes, axis=1)
    return np.ascontiguousarray(out.reshape(groups, k, len(grids), rows).transpose(2, 0, 3, 1))


def descent(problem: Problem, g: Grid, codes: Floats) -> Floats:
    """Single weights moved to where the error of their row is least, in turn, until none moves."""
    h = problem.second
    codes = codes.copy()
    slope = (_seen(codes, g) - problem.target) @ h
    scale = g.scale[..., 0]
    diagonal = np.ascontiguousarray(np.diagonal(h, axis1=1, axis2=2))
    active = np.ones(scale.shape, bool)
    for _ in range(SWEEPS):
        moved_rows = np.zeros_like(active)
        for k in range(h.shape[1]):
            now = codes[:, :, k]
            wish = np.clip(np.rint(now - slope[:, :, k] / (scale * diagonal[:, k][:, None])), g.scheme.low,
                           g.scheme.high)
            at = np.nonzero((wish != now) & active)
            if not len(at[0]):
                continue
            step = (wish[at] - now[at]) * scale[at]
            gain = step * (2 * slope[:, :, k][at] + step * diagonal[at[0], k])
            helps = gain < -1e-6 * np.square(scale[at]) * diagonal[at[0], k]
            at = at[0][helps], at[1][helps]
            codes[at[0], at[1], k] = wish[at]
            slope[at] += step[helps][:, None] * h[at[0], k]
            moved_rows[at] = True
        active = moved_rows
        if not active.any():
            break
    return codes


def pairs(problem: Problem, g: Grid, codes: Floats) -> Floats:
    """Two weights of a row moved by one step each, where together they lessen its error and no single one does: of the
    CANDIDATES least harmful single moves the best pair, until none helps."""
    h, codes = problem.second, codes.copy()
    groups, rows, k = codes.shape
    slope = (_seen(codes, g) - problem.target) @ h
    scale = g.scale[..., 0]
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    count = min(CANDIDATES, 2 * k)
    lane, row = (a.ravel() for a in np.indices((groups, rows)))
    for _ in range(PAIR_ROUNDS):
        s = scale[lane, row][:, None]
        square, lean = s * s * diagonal[lane], 2 * s * slope[lane, row]
        now = codes[lane, row]
        single = np.concatenate([np.where(now < g.scheme.high, square + lean, np.inf),
                                 np.where(now > g.scheme.low, square - lean, np.inf)], axis=1)
        near = np.argpartition(single, count - 1, axis=1)[:, :count]
        place, sign = near % k, np.where(near < k, 1.0, -1.0).astype(codes.dtype)
        alone = np.take_along_axis(single, near, axis=1)
        both = h[lane[:, None, None], place[:, :, None], place[:, None, :]] * sign[:, :, None] * sign[:, None, :]
        both = alone[:, :, None] + alone[:, None, :] + 2 * (s * s)[:, :, None] * both
        both[place[:, :, None] == place[:, None, :]] = np.inf
        flat = both.reshape(len(lane), -1)
        best = np.argmin(flat, axis=1)
        at = np.arange(len(lane))
        helps = flat[at, best] < -1e-6 * square.mean(axis=1)
        if not helps.any():
            break
        at, lane, row, s = at[helps], lane[helps], row[helps], s[helps, 0]
        for one in np.divmod(best[helps], count):
            p, way = place[at, one], sign[at, one]
            codes[lane, row, p] += way
            slope[lane, row] += (way * s)[:, None] * h[lane, p]
    return descent(problem, g, codes)


def relaxed(problem: Problem, g: Grid, iterations: int | None = None) -> Floats:
    """AdaRound: floor + h(V), h a rectified sigmoid stretched to -0.1..1.1; Adam on the error and on a regularizer that
    drives h to 0 or 1, its sharpness beta annealed from 20 to 2 behind a start of 20 % without it."""
    iterations = ITERATIONS if iterations is None else iterations
    h, target, scale = problem.second, problem.target, g.scale
    floor = np.floor(target / scale)
    part = np.clip(target / scale - floor, 0.01, 0.99)
    v = -np.log(1.2 / (part + 0.1) - 1)
    first, second = np.zeros_like(v), np.zeros_like(v)
    unit = problem.cost(_seen(nearest(target, g), g) - target)[:, :, None] + 1e-30
    weight = 0.01 * 0.1
    for t in range(1, iterations + 1):
        sigma = 1 / (1 + np.exp(-v))
        soft = np.clip(1.2 * sigma - 0.1, 0, 1)
        inner = ((soft > 0) & (soft < 1)) * 1.2 * sigma * (1 - sigma)
        level = floor + soft + g.zero
        off = (np.clip(level, g.scheme.low, g.scheme.high) - g.zero) * scale - target
        slope = 2 * (off @ h) * scale / unit
        done = t / iterations
        if done > 0.2:
            beta = 2 + 18 * 0.5 * (1 + np.cos(np.pi * (done - 0.2) / 0.8))
            apart = 2 * soft - 1
            slope -= weight * 2 * beta * np.sign(apart) * np.abs(apart) ** (beta - 1)
        grad = slope * inner
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad * grad
        v -= 0.05 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-12)
    up = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1) >= 0.5
    return np.asarray(np.clip(floor + up + g.zero, g.scheme.low, g.scheme.high))

