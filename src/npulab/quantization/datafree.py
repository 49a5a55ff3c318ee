"""Calibration without data: pictures made of noise, and what batch normalization remembers of the training data.

Natural images have amplitudes that fall with the frequency (D. J. Field 1987, 10.1364/JOSAA.4.002379), so noise with
such a spectrum, correlated between colours, stands in for them. How a network wants its pixels is not in its file: of
the usual normalizations the one is taken under which the first layers give the means and deviations that their batch
normalization has; without any, -1..1. Ranges of tensors that batch normalization made are taken from its moments
(Nagel et al. 2019, arXiv:1906.04721: mean and a number of deviations).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from npulab.quantization.emit import float_model
from npulab.quantization.network import Network
from npulab.quantization.observe import Statistics, observe
from npulab.quantization.types import F32, Feeds, ListedSamples, Samples

PICTURES = 16
NORMALIZATIONS: Mapping[str, tuple[F32, F32]] = {
    "-1..1": (np.full(3, 127.5, np.float32), np.full(3, 127.5, np.float32)),
    "0..1": (np.zeros(3, np.float32), np.full(3, 255, np.float32)),
    "raw": (np.zeros(3, np.float32), np.ones(3, np.float32)),
    "imagenet": (np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)),
}
"""Mean and deviation that pixels 0..255 are normalized with."""
DEVIATIONS = 6.0
"""Of a channel, on both sides of its mean, that a range holds (Nagel et al. 2019)."""
CHANNELS_MAX = 4
"""Of an input that is a picture."""


def made_up(net: Network, seed: int = 0) -> tuple[Samples, list[str]]:
    """Samples for the network's inputs, and what was assumed."""
    rng = np.random.default_rng(seed)
    values = [net.graph.values[v] for v in net.graph.inputs]
    pixels = {v.name: [_picture(rng, v.shape) for _ in range(PICTURES)] for v in values if _is_picture(v.shape)}
    others = {v.name: [rng.standard_normal(v.shape).astype(np.float32) for _ in range(PICTURES)] for v in values
              if not _is_picture(v.shape)}

    def under(name: str) -> ListedSamples:
        feeds: list[Feeds] = []
        for i in range(PICTURES):
            feeds.append({**{k: _normalized(x[i], name) for k, x in pixels.items()},
                          **{k: x[i] for k, x in others.items()}})
        return ListedSamples(feeds, "noise made up in place of data")

    notes = ["without data: calibrated with noise, which is a guess; give --data for a network that is to be used"]
    if not pixels:
        return under("-1..1"), notes
    remembered = [v for v in net.moments if v in net.of or any(layer.linear == v for layer in net.layers)][:3]
    if not remembered:
        notes.append("how the network wants its pixels is not known: -1..1 is assumed")
        return under("-1..1"), notes
    best = min(NORMALIZATIONS, key=lambda name: _mismatch(net, under(name), remembered))
    notes.append(f"pixels are taken as {best}: so the first layers fit their batch normalization best")
    return under(best), notes


def remember(net: Network, seen: Mapping[int, Statistics]) -> list[str]:
    """Extremes of tensors that batch normalization made, from its moments instead of the noise."""
    count = 0
    for p in net.quantized_points():
        layer = net.layer_of(p.value)
        source = layer.linear if layer is not None else p.value
        moments = net.moments.get(source) or net.moments.get(p.value)
        if moments is None or p.value not in seen:
            continue
        mean, deviation = moments
        low, high = float((mean - DEVIATIONS * deviation).min()), float((mean + DEVIATIONS * deviation).max())
        if layer is not None:
            low, high = max(low, layer.clamp[0]), min(high, layer.clamp[1])
        s = seen[p.value]
        s.low, s.high = min(low, high), max(low, high)
        s.smooth_low, s.smooth_high = s.low, s.high
        count += 1
    return [f"ranges of {count} tensors from batch normalization"] if count else []


def _is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and min(shape[1], shape[3]) <= CHANNELS_MAX


def _picture(rng: np.random.Generator, shape: tuple[int, ...]) -> F32:
    """Pixels 0..255 of the input's shape: noise whose amplitudes are inverse to the frequency, alike in all colours."""
    first = shape[1] <= CHANNELS_MAX
    channels, (h, w) = (shape[1], shape[2:]) if first else (shape[3], shape[1:3])
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(h, w))

    def plane() -> F32:
        spectrum = np.fft.rfft2(rng.standard_normal((h, w))) * amplitude
        noise = np.fft.irfft2(spectrum, (h, w))
        return np.asarray(noise / max(float(noise.std()), 1e-9), np.float32)

    common = plane()
    colours = np.stack([0.9 * common + 0.44 * plane() for _ in range(channels)])
    pixels = np.clip(rng.uniform(80, 150) + rng.uniform(35, 75) * colours, 0, 255)
    pixels = pixels if first else pixels.transpose(1, 2, 0)
    return np.asarray(np.broadcast_to(pixels, shape), np.float32)


def _normalized(x: F32, name: str) -> F32:
    mean, deviation = NORMALIZATIONS[name]
    first = x.shape[1] <= CHANNELS_MAX
    n = x.shape[1 if first else 3]
    m, d = (mean, deviation) if n == 3 else (np.full(n, mean.mean(), np.float32), np.full(n, deviation.mean(),
                                                                                         np.float32))
    shape = (1, n, 1, 1) if first else (1, 1, 1, n)
    return np.asarray((x - m.reshape(shape)) / d.reshape(shape), np.float32)


def _mismatch(net: Network, samples: Samples, values: list[int]) -> float:
    """How far the moments of channels are from the remembered ones, in their deviations."""
    names = [net.name(v) for v in values]
    found = observe(float_model(net), names, samples, channels=names)
    total = 0.0
    for v in values:
        mean, deviation = net.moments[v]
        s = found[net.name(v)]
        spread = np.maximum(deviation, 1e-3)
        total += float(np.mean(np.abs(s.channel_means - mean) / spread)
                       + np.mean(np.abs(np.log(np.maximum(s.channel_deviations, 1e-6) / spread))))
    return total
