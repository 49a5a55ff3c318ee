"""Bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2): the mean that quantizing adds to each output
channel of a layer is taken out of its bias.

`fast` looks at each layer by itself, with the inputs of the float network: bias -= E[(Wq - W) x].
`full` goes through the network in order, each layer behind the quantized and already corrected ones, so that what
rounding of activations and of earlier layers adds is taken out too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from npulab.errors import InvariantError
from npulab.ir.ops import OnnxOp
from npulab.quantization.chains import Floats, by_input, channel_axis
from npulab.quantization.emit import float_model
from npulab.quantization.gram import placed, upto
from npulab.quantization.moments import input_moments, sums
from npulab.quantization.network import Layer, Network
from npulab.quantization.parts import apart, each
from npulab.quantization.session import Progress
from npulab.quantization.stages import sequential
from npulab.quantization.types import F32, Array, Samples

MOST = 256
"""Samples that `full` takes: means by channel settle long before."""
CACHE_BYTES = 512 << 20
"""Of tensors of all samples that wait between layers in `full`; fewer samples are taken where they need more."""


def fast(net: Network, samples: Samples | None, progress: Progress | None = None) -> list[str]:
    """Each layer's own error of the mean, out of its bias. Params of the weights must be chosen.

    Exact for the samples, padding and strides included. Without samples by what batch normalization says of the inputs
    (`moments.input_moments`), where it does, and as if nothing were padded.
    """
    layers = _correctable(net)
    found: dict[int, Floats] = {}
    if samples is None:
        inputs = input_moments(net)
        for layer in layers:
            if layer.node in inputs and layer.kind != "transposed":
                off = by_input(layer, layer.seen.astype(np.float64) - layer.weight)
                found[layer.node] = sums(layer, off, inputs[layer.node][0])
    else:
        for layer, means in _met(net, layers, samples, progress):
            found[layer.node] = _behind(layer, layer.seen - layer.weight, means)
    notes = [_take(layer, found[layer.node]) for layer in layers if layer.node in found]
    return notes + [f"{layer.name}: nothing is known of its input's means, not corrected"
                    for layer in layers if layer.node not in found]


def full(net: Network, samples: Samples, means: Mapping[int, Floats] | None = None, progress: Progress | None = None,
         cache: int = CACHE_BYTES) -> list[str]:
    """Each layer's error of the mean in the quantized network, in order. All params must be chosen.

    means   `linear_means` of the float network and the same samples; None: measured on the network as it is, whose
            biases then must not have been corrected yet.
    cache   bytes of tensors that wait between layers.
    """
    layers = _correctable(net)
    if not layers:
        return []
    wanted = means if means is not None else linear_means(net, samples, progress)
    for layer in layers:
        if layer.bias is None:
            layer.bias = np.zeros(layer.channels, np.float32)
    notes: list[str] = []

    def visit(layer: Layer, got: Floats) -> None:
        target = wanted[layer.node]
        if len(target) < len(got):
            raise InvariantError(f"means of '{layer.name}' are of {len(target)} samples, not of {len(got)}")
        notes.append(_take(layer, got.mean(axis=0) - target[: len(got)].mean(axis=0)))

    taken = sequential(net, layers, samples, visit, MOST, cache, progress)
    if taken < min(len(samples), MOST):
        notes.append(f"full bias correction saw {taken} of {len(samples)} samples: more do not fit into "
                     f"{cache >> 20} MiB")
    return notes


def linear_means(net: Network, samples: Samples, progress: Progress | None = None) -> dict[int, Floats]:
    """Means by channel of layers' results before the clamp in the float network, by layer.node: (samples, channels) of
    the first MOST samples."""
    layers = _correctable(net)
    axes = [channel_axis(layer, len(net.graph.values[layer.linear].shape)) for layer in layers]

    def work(arrays: Sequence[Array]) -> list[Floats]:
        return [a.mean(axis=tuple(i for i in range(a.ndim) if i != axis), dtype=np.float64)
                for a, axis in zip(arrays, axes, strict=True)]

    rows: list[list[Floats]] = []
    for found in each(float_model(net), [net.name(layer.linear) for layer in layers], samples, work, progress):
        rows.append(found)
        if len(rows) == MOST:
            break
    return {layer.node: np.stack([row[i] for row in rows]) for i, layer in enumerate(layers)}


def _correctable(net: Network) -> list[Layer]:
    """Layers in integers that have a bias, or can have one."""
    return [layer for layer in net.layers if layer.scheme is not None and layer.params is not None
            and (layer.kind != "matmul" or layer.added >= 0)]


def _take(layer: Layer, off: Floats) -> str:
    """Take a mean error out of the bias."""
    bias = np.zeros(layer.channels, np.float32) if layer.bias is None else layer.bias
    layer.bias = (bias.astype(np.float64) - off).astype(np.float32)
    return f"{layer.name}: means were off by {np.sqrt(np.mean(off**2)):.3g} (root mean square), at most " \
           f"{np.abs(off).max(initial=0.0):.3g}"


def _met(net: Network, layers: Sequence[Layer], samples: Samples, progress: Progress | None
         ) -> list[tuple[Layer, Floats]]:
    """What weights of layers meet in the float network, by input channel and tap: means over all places of the result,
    zero where a tap lies beyond the input, and over the samples. (channels,) of matrix products."""
    if not layers:
        return []
    reads = {net.name(layer.data): [k for k, other in enumerate(layers) if other.data == layer.data]
             for layer in layers}
    taken = [_taken(net, layer) for layer in layers]
    totals: dict[int, Floats] = {}

    def work(_: int, arrays: Mapping[str, Array]) -> list[tuple[int, Floats]]:
        return [(k, _mean(x, taken[k])) for name, x in arrays.items() for k in reads[name]]

    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):  # one thread: the same sums to the last bit
        for _, means in apart(upto(float_model(net), list(reads)), list(reads), samples, work, progress):
            for k, mean in means:
                totals[k] = totals[k] + mean if k in totals else mean
    return [(layer, totals[k] / len(samples)) for k, layer in enumerate(layers)]


def _taken(net: Network, layer: Layer) -> list[F32] | None:
    """Along each axis of an image (size, taps): how many places of the result have an element under a tap, as a share
    of all. None for matrix products."""
    if layer.kind in ("gemm", "matmul"):
        return None
    data, result = net.graph.values[layer.data].shape, net.graph.values[layer.linear].shape
    op = net.graph.nodes[layer.node].op
    assert isinstance(op, OnnxOp)
    found = []
    for size, out, taps, stride, dilation, begin in zip(data[2:], result[2:], layer.weight.shape[2:],
                                                        *placed(op, layer, data, result), strict=True):
        counts = np.zeros((size, taps), np.float32)
        for tap in range(taps):
            if layer.kind == "conv":
                at = np.arange(out) * stride + tap * dilation - begin
                counts[at[(at >= 0) & (at < size)], tap] = 1
            else:
                at = np.arange(size) * stride + tap * dilation - begin
                counts[(at >= 0) & (at < out), tap] = 1
        counts /= out
        found.append(counts)
    return found


def _mean(x: Array, taken: Sequence[F32] | None) -> Floats:
    """(channels, taps...) of one sample; (channels,) of a matrix product's."""
    if taken is None:
        return np.asarray(x.reshape(-1, x.shape[-1]).mean(axis=0, dtype=np.float64))
    for i in range(len(taken), 0, -1):  # the last axis first: a product of matrices, and little is left of it
        x = np.moveaxis(np.tensordot(x, taken[i - 1], axes=(1 + i, 0)), -1, 1 + i)
    return np.asarray(x.mean(axis=0, dtype=np.float64))


def _behind(layer: Layer, weight: F32, means: Floats) -> Floats:
    """Means of the layer's result by channel, without a bias, from those of what its weights meet."""
    if layer.kind in ("gemm", "matmul"):
        return np.asarray(np.einsum("ok,k->o", layer.rows(weight), means))
    g = layer.groups
    if layer.kind == "conv":
        rows = weight.reshape(g, layer.channels // g, -1)
        return np.asarray(np.einsum("gok,gk->go", rows, means.reshape(g, -1)).ravel())
    columns = weight.reshape(g, len(weight) // g, layer.channels // g, -1)
    return np.asarray(np.einsum("giok,gik->go", columns, means.reshape(g, len(weight) // g, -1)).ravel())
