"""Limits of a chip's sums and multipliers, obeyed: scales are widened until everything fits.

The sum of an output channel's products, at its worst input, stays inside the accumulator; the absolute weights of a
channel add up to what the chip allows; input scale * weight scale / output scale stays below what its multiplier holds.
Networks of usual sizes meet all of these as they are; then nothing changes.
"""

from __future__ import annotations

import numpy as np

from npulab.program.pages import let_go
from npulab.quantization.emit import bias_codes, bias_params
from npulab.quantization.network import Layer, Network
from npulab.quantization.types import Params

ROUNDS = 40
ROOM = 1.0 + 2.0**-10
"""What a widened scale gets beside the need, so that rounding codes anew does not undo it."""


def obey(net: Network) -> list[str]:
    """Params of weights and points that break a limit, widened; a line for each."""
    notes = []
    for layer in net.layers:
        data, out = net.of.get(layer.data), net.of.get(layer.result)
        if layer.params is None or data is None or data.params is None:
            continue
        widest = 1.0
        for _ in range(ROUNDS):
            factor = _excess(net, layer, data.params)
            if (factor <= 1).all():
                break
            widest *= float(factor.max())
            layer.params, layer.codes = _widened(layer.params, factor * ROOM), None
        if widest > 1:
            notes.append(f"{layer.name}: scales of weights {widest:.3g} times wider, so that its sums fit")
        below = net.rules.requantize_below
        if below is not None and out is not None and out.params is not None:
            ratio = float(data.params.scales[0]) * float(layer.params.scales.max()) / float(out.params.scales[0])
            if ratio >= below:
                out.params = _widened(out.params, np.array([ratio / below * ROOM]))
                notes.append(f"{layer.name}: its result's scale {ratio / below:.3g} times wider, so that the chip's "
                             "multiplier holds the quotient of scales")
    return notes


def _excess(net: Network, layer: Layer, data: Params) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """By how much each channel (or the layer, with one scale) is beyond the limits of sums; at most 1: not at all."""
    assert layer.params is not None
    rules, p = net.rules, layer.params
    codes = layer.codes if layer.codes is not None else p.codes(layer.weight)
    zeros = p.zeros.reshape(p.along(codes.ndim))
    let_go(layer.weight)
    rows, offsets = layer.rows(codes), layer.rows(np.broadcast_to(zeros, codes.shape))
    total = np.array([np.abs(row.astype(np.int64) - offset).sum() for row, offset in zip(rows, offsets, strict=True)],
                     np.float64)
    zero = int(data.zeros[0])
    sums = total * max(data.scheme.high - zero, zero - data.scheme.low)
    if layer.bias is not None:
        sums = sums + np.abs(bias_codes(layer.bias, bias_params(layer, data)).astype(np.float64))
    bits = rules.accumulator_bits if data.scheme.bits < 16 else max(64, rules.accumulator_bits)
    excess = sums / (2.0 ** (bits - 1) - 1)
    if rules.weight_sum_max is not None:
        excess = np.maximum(excess, total / rules.weight_sum_max)
    return np.asarray(np.maximum(excess if p.axis is not None else excess.max(keepdims=True), 1.0), np.float64)


def _widened(p: Params, factor: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Params:
    """The scales times the factors where these are above 1."""
    scales = p.scales.astype(np.float64) * np.where(factor > ROOM, factor, 1.0)
    if p.scheme.power_of_two:
        scales = 2.0 ** np.ceil(np.log2(scales) - 1e-9)
    scales32 = scales.astype(np.float32)
    if p.scheme.symmetric:
        return Params(p.scheme, scales32, p.zeros, p.axis)
    s = p.scheme  # the zero point moves toward the end where the range begins
    lows = (s.low - p.zeros) * p.scales.astype(np.float64)
    zeros = np.clip(np.rint(s.low - lows / scales32), s.low, s.high).astype(np.int32)
    return Params(s, scales32, zeros, p.axis)
