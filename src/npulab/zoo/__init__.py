"""Topologies of well-known networks built from code, with seeded random weights, as ONNX files.

Times, memory and placement depend on a network's shape, not on what it has learned: no download is needed for them.
Weights are drawn so that activations keep their order of magnitude through the whole network (builder.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from npulab.errors import UsageError

if TYPE_CHECKING:
    from npulab.zoo.builder import Net

SIZE_MIN, SIZE_MAX = 32, 2048
"""Pixels of an input's side."""
CLASSES_MAX = 25_000
"""With more, the largest file would not be a protobuf message (2 GiB)."""
SEED_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Topology:
    """`size` in pixels and `classes` are those of the source; sizes are multiples of `stride`."""

    name: str
    about: str
    source: str
    build: Callable[[Net, int, int], None]
    size: int = 224
    classes: int = 1000
    stride: int = 32


@cache
def topologies() -> Mapping[str, Topology]:
    """Every topology, by its name."""
    from npulab.zoo import classifiers, detectors, repvgg, transformers

    return {t.name: t for t in (
        Topology("repvgg-a2", "3x3 convolutions with ReLU, nothing else", "arXiv:2101.03697",
                 repvgg.repvgg_a2),
        Topology("repvgg-a2-train", "the same as it trains: three branches a block",
                 "arXiv:2101.03697", repvgg.repvgg_a2_train),
        Topology("resnet50", "v1.5: bottlenecks, the 3x3 has the stride", "arXiv:1512.03385",
                 classifiers.resnet50),
        Topology("mobilenet-v1", "depthwise separable convolutions", "arXiv:1704.04861", classifiers.mobilenet_v1),
        Topology("mobilenet-v2", "inverted residuals, ReLU6", "arXiv:1801.04381", classifiers.mobilenet_v2),
        Topology("mobilenet-v3", "large: squeeze and excitation, HardSwish", "arXiv:1905.02244",
                 classifiers.mobilenet_v3),
        Topology("squeezenet", "1.1: fire modules, no fully connected layer", "arXiv:1602.07360",
                 classifiers.squeezenet, stride=16),
        Topology("yolov5s", "v6.0: C3, SPPF, SiLU; boxes decoded", "github.com/ultralytics/yolov5, models/yolov5s.yaml",
                 detectors.yolov5s, 640, 80),
        Topology("yolov8n", "C2f, SPPF, SiLU, DFL; boxes decoded",
                 "github.com/ultralytics/ultralytics, models/v8/yolov8.yaml", detectors.yolov8n, 640, 80),
        Topology("ssdlite", "MobileNetV2, SSDLite; raw boxes and classes",
                 "arXiv:1801.04381, section 6.2", detectors.ssdlite, 320, 91),
        Topology("vit-tiny", "patches of 16, 12 blocks, width 192, 3 heads", "arXiv:2012.12877, DeiT-Ti",
                 transformers.vit_tiny, stride=16),
    )}


def build(name: str, size: int | None = None, classes: int | None = None, seed: int = 0) -> bytes:
    """The ONNX file of a topology: float32, opset 17, batch 1. The same arguments give the same bytes.

    `size`: side of the square input in pixels; `size` and `classes` are by default those of the source.

    Raises: UsageError for a name, size, number of classes or seed out of range, and where onnx is not installed.
    """
    t = find(name)
    size, classes = t.size if size is None else size, t.classes if classes is None else classes
    if not SIZE_MIN <= size <= SIZE_MAX or size % t.stride:
        near = min(max(round(size / t.stride) * t.stride, SIZE_MIN), SIZE_MAX)
        raise UsageError(f"{name} cannot have an input of {size}x{size}", got=size, try_=f"--size {near}",
                         want=f"{SIZE_MIN}..{SIZE_MAX} pixels, a multiple of {t.stride}")
    for what, number, low, high in (("classes", classes, 1, CLASSES_MAX), ("seed", seed, 0, SEED_MAX)):
        if not low <= number <= high:
            raise UsageError(f"{name} cannot be built with --{what} {number}", want=f"{low}..{high}", got=number)
    from npulab.zoo.builder import Net

    net = Net(name, seed)
    t.build(net, size, classes)
    return net.onnx()


def find(name: str) -> Topology:
    """Raises: UsageError naming what there is."""
    known = topologies()
    if name not in known:
        import difflib

        close = difflib.get_close_matches(name.lower().replace("_", "-"), known, 1, 0.5)
        raise UsageError(f"the zoo has no topology '{name}'", want=", ".join(known),
                         **({"try_": close[0]} if close else {}))
    return known[name]
