"""Random quantized layers as TFLite files, and LiteRT's reference kernels as their oracle."""

from __future__ import annotations

import numpy as np

from npulab.exporters.tflite_builder import ModelBuilder


class Layers:
    """Builds a model layer by layer with ranges that keep most outputs off the clamps. `signed`: int8, else uint8."""

    def __init__(self, seed: int, signed: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.signed = signed
        self.dtype = "int8" if signed else "uint8"
        self.model = ModelBuilder("layers")
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.scales: dict[int, float] = {}
        self.zeros: dict[int, int] = {}
        self.inputs: list[int] = []

    def _tensor(self, shape, scale, zero, data=None, dtype=None):
        v = self.model.tensor(f"t{len(self.shapes)}", shape, dtype or self.dtype, scale=scale, zero_point=zero,
                              data=data)
        self.shapes[v], self.scales[v], self.zeros[v] = tuple(shape), scale, zero
        return v

    def zero(self) -> int:
        z = int(self.rng.integers(0, 256))
        return z - 128 if self.signed else z

    def input(self, *shape: int, scale: float | None = None, zero: int | None = None) -> int:
        v = self._tensor(shape, scale or self.scale(), self.zero() if zero is None else zero)
        self.inputs.append(v)
        return v

    def scale(self) -> float:
        return float(np.float32(self.rng.uniform(0.005, 0.1)))

    def _weights(self, shape, sparse=0.0):
        zero = 0 if self.signed else self.zero()  # int8 weights are symmetric in TFLite
        w = self.rng.integers(-127, 128, shape) if self.signed else self.rng.integers(0, 256, shape)
        w[self.rng.random(shape) < sparse] = zero
        scale = float(np.float32(self.rng.uniform(0.001, 0.01)))
        return self._tensor(shape, scale, zero, w.astype(self.dtype)), scale

    def _bias(self, count, scale):
        data = self.rng.integers(-2000, 2000, count).astype("int32")
        return self._tensor((count,), scale, 0, data, "int32")

    def _spread(self, in_scale, w_scale, taps):
        """An output scale that puts about two standard deviations of random sums into 8 bits."""
        return float(np.float32(in_scale * w_scale * 104 * 90 * np.sqrt(taps) * 4 / 255))

    def conv(self, x, out_c, kernel, stride=1, padding="SAME", activation="NONE", dilation=(1, 1), groups=1,
             sparse=0.0, out_scale=None, out_zero=None):
        _, h, w, c = self.shapes[x]
        ky, kx = kernel
        weights, w_scale = self._weights((out_c, ky, kx, c // groups), sparse)
        s_in = self.scales[x]
        bias = self._bias(out_c, float(np.float32(s_in * w_scale)))
        scale = out_scale or self._spread(s_in, w_scale, ky * kx * c // groups)
        out = self._tensor((1, *self.extent(h, w, kernel, stride, padding, dilation), out_c), scale,
                           self.zero() if out_zero is None else out_zero)
        self.model.op("CONV_2D", [x, weights, bias], [out], padding=padding, stride_w=stride, stride_h=stride,
                      fused_activation_function=activation,
                      dilation_h_factor=dilation[0], dilation_w_factor=dilation[1])
        return out

    def depthwise(self, x, kernel, stride=1, padding="SAME", activation="NONE", multiplier=1, dilation=(1, 1)):
        _, h, w, c = self.shapes[x]
        ky, kx = kernel
        weights, w_scale = self._weights((1, ky, kx, c * multiplier))
        s_in = self.scales[x]
        bias = self._bias(c * multiplier, float(np.float32(s_in * w_scale)))
        out = self._tensor((1, *self.extent(h, w, kernel, stride, padding, dilation), c * multiplier),
                           self._spread(s_in, w_scale, ky * kx), self.zero())
        self.model.op("DEPTHWISE_CONV_2D", [x, weights, bias], [out], padding=padding, stride_w=stride, stride_h=stride,
                      depth_multiplier=multiplier, fused_activation_function=activation,
                      dilation_h_factor=dilation[0], dilation_w_factor=dilation[1])
        return out

    @staticmethod
    def extent(h, w, kernel, stride, padding, dilation):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        return tuple(-(-(n if padding == "SAME" else n - r + 1) // stride) for n, r in zip((h, w), reach, strict=True))

    def add(self, a, b, activation="NONE", out_scale=None):
        scale = out_scale or float(np.float32(self.scales[a] + self.scales[b]))
        out = self._tensor(self.shapes[a], scale, self.zero())
        self.model.op("ADD", [a, b], [out], fused_activation_function=activation)
        return out

    def concat(self, *parts):
        *most, _ = self.shapes[parts[0]]
        out = self._tensor((*most, sum(self.shapes[p][-1] for p in parts)), self.scales[parts[0]], self.zeros[parts[0]])
        self.model.op("CONCATENATION", list(parts), [out], axis=3, fused_activation_function="NONE")
        return out

    def split(self, x, pieces):
        axis = self._tensor((), None, None, np.array(3, "int32"), "int32")
        *most, c = self.shapes[x]
        outs = [self._tensor((*most, c // pieces), self.scales[x], self.zeros[x]) for _ in range(pieces)]
        self.model.op("SPLIT", [axis, x], outs, num_splits=pieces)
        return outs

    def pad(self, x, rows, columns):
        pads = np.array([(0, 0), rows, columns, (0, 0)], "int32")
        table = self._tensor((4, 2), None, None, pads, "int32")
        _, h, w, c = self.shapes[x]
        out = self._tensor((1, h + sum(rows), w + sum(columns), c), self.scales[x], self.zeros[x])
        self.model.op("PAD", [x, table], [out])
        return out

    def average(self, x):
        _, h, w, c = self.shapes[x]
        out = self._tensor((1, 1, 1, c), self.scales[x], self.zeros[x])
        self.model.op("AVERAGE_POOL_2D", [x], [out], padding="VALID", stride_w=1, stride_h=1, filter_width=w,
                      filter_height=h, fused_activation_function="NONE")
        return out

    def pool(self, x, window, stride=1, activation="NONE"):
        _, h, w, c = self.shapes[x]
        size = self.extent(h, w, window, stride, "VALID", (1, 1))
        out = self._tensor((1, *size, c), self.scales[x], self.zeros[x])
        self.model.op("AVERAGE_POOL_2D", [x], [out], padding="VALID", stride_w=stride, stride_h=stride,
                      filter_width=window[1], filter_height=window[0], fused_activation_function=activation)
        return out

    def mean(self, x):
        axes = self._tensor((2,), None, None, np.array([1, 2], "int32"), "int32")
        out = self._tensor((1, self.shapes[x][3]), self.scale(), self.zero())
        self.model.op("MEAN", [x, axes], [out], keep_dims=False)
        return out

    def reshape(self, x, *shape):
        new = self._tensor((len(shape),), None, None, np.array(shape, "int32"), "int32")
        out = self._tensor(shape, self.scales[x], self.zeros[x])
        self.model.op("RESHAPE", [x, new], [out], new_shape=list(shape))
        return out

    def dense(self, x, m, activation="NONE"):
        n = int(np.prod(self.shapes[x]))
        weights, w_scale = self._weights((m, n))
        s_in = self.scales[x]
        bias = self._bias(m, float(np.float32(s_in * w_scale)))
        out = self._tensor((1, m), self._spread(s_in, w_scale, n), self.zero())
        self.model.op("FULLY_CONNECTED", [x, weights, bias], [out], fused_activation_function=activation)
        return out

    def build(self, *outputs: int) -> bytes:
        return self.model.build(self.inputs, list(outputs))

    def samples(self) -> dict[str, np.ndarray]:
        low, high = (-128, 128) if self.signed else (0, 256)
        names = [f"t{v}" for v in self.inputs]
        return {name: self.rng.integers(low, high, self.shapes[v]).astype(self.dtype)
                for name, v in zip(names, self.inputs, strict=True)}


def litert(model: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output of the model under LiteRT's reference kernels, by name."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    run = Interpreter(model_content=model, experimental_op_resolver_type=OpResolverType.BUILTIN_REF, num_threads=1)
    run.allocate_tensors()
    for d in run.get_input_details():
        run.set_tensor(d["index"], inputs[d["name"]])
    run.invoke()
    return {d["name"]: run.get_tensor(d["index"]) for d in run.get_output_details()}
