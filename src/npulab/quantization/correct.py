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
from npulab.quantization.chains import Floats, by_input, channel_axis
from npulab.quantization.emit import float_model
from npulab.quantization.moments import input_moments, sums
from npulab.quantization.network import Layer, Network
from npulab.quantization.parts import each
from npulab.quantization.probes import Probed
from npulab.quantization.session import Progress
from npulab.quantization.stages import sequential
from npulab.quantization.types import Array, Samples

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
    elif layers:
        model, names = _differences(net, layers)
        totals = [np.zeros(layer.channels) for layer in layers]
        for means in each(model, names, samples, lambda arrays: [np.array(a, np.float64) for a in arrays], progress):
            for total, mean in zip(totals, means, strict=True):
                total += mean.reshape(-1)
        found = {layer.node: total / len(samples) for layer, total in zip(layers, totals, strict=True)}
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


def _differences(net: Network, layers: Sequence[Layer]) -> tuple[bytes, list[str]]:
    """The float network with, beside each layer, one of what quantizing adds to its weights, and the mean by channel of
    what that gives: the file and the means' names."""
    probed = Probed(net)
    names = []
    for layer in layers:
        off = (layer.seen.astype(np.float64) - layer.weight).astype(np.float32)
        product = probed.again(layer, net.name(layer.data), off, None)
        rank = len(net.graph.values[layer.linear].shape)
        names.append(probed.reduce("ReduceMean", product, [i for i in range(rank) if i != channel_axis(layer, rank)]))
    return probed.model(), names
