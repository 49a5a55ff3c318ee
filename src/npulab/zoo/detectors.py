"""Detectors of objects: an image in, boxes and scores out; what selects among the boxes is not part of them."""

from __future__ import annotations

import numpy as np

from npulab.zoo.builder import Net
from npulab.zoo.classifiers import mobilenet_v2_features

STRIDES = (8, 16, 32)
V5_ANCHORS = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))
"""(width, height) in pixels, three a stride."""
V8_BINS = 16
"""Bins of the distribution of each side's distance."""
SSD_ANCHORS = (3, 6, 6, 6, 6, 6)
"""Boxes a place of each of the six maps."""


def yolov5s(net: Net, size: int, classes: int) -> None:
    """YOLOv5 v6.0, widths x 0.5 and depths x 0.33; output 1,N,5+classes: x, y, w, h in pixels, object, classes."""
    x = _silu(net, net.input("images", 1, 3, size, size), 32, 6, 2, "0", pad=2)
    x = _c3(net, _silu(net, x, 64, 3, 2, "1"), 64, 1, True, "2")
    p3 = _c3(net, _silu(net, x, 128, 3, 2, "3"), 128, 2, True, "4")
    p4 = _c3(net, _silu(net, p3, 256, 3, 2, "5"), 256, 3, True, "6")
    p5 = _sppf(net, _c3(net, _silu(net, p4, 512, 3, 2, "7"), 512, 1, True, "8"), 512, "9")
    n5 = _silu(net, p5, 256, 1, 1, "10")
    x = _c3(net, net.concat([net.upsample(n5, name="11"), p4], 1, name="12"), 256, 1, False, "13")
    n4 = _silu(net, x, 128, 1, 1, "14")
    d3 = _c3(net, net.concat([net.upsample(n4, name="15"), p3], 1, name="16"), 128, 1, False, "17")
    d4 = _c3(net, net.concat([_silu(net, d3, 128, 3, 2, "18"), n4], 1, name="19"), 256, 1, False, "20")
    d5 = _c3(net, net.concat([_silu(net, d4, 256, 3, 2, "21"), n5], 1, name="22"), 512, 1, False, "23")
    rows = [_v5_rows(net, d, level, classes) for level, d in enumerate((d3, d4, d5))]
    net.output(net.concat(rows, 1, name="24"), "output0")


def yolov8n(net: Net, size: int, classes: int) -> None:
    """YOLOv8, widths x 0.25 and depths x 0.33; output 1,4+classes,N: x, y, w, h in pixels, classes."""
    x = _silu(net, net.input("images", 1, 3, size, size), 16, 3, 2, "0")
    x = _c2f(net, _silu(net, x, 32, 3, 2, "1"), 32, 1, True, "2")
    p3 = _c2f(net, _silu(net, x, 64, 3, 2, "3"), 64, 2, True, "4")
    p4 = _c2f(net, _silu(net, p3, 128, 3, 2, "5"), 128, 2, True, "6")
    p5 = _sppf(net, _c2f(net, _silu(net, p4, 256, 3, 2, "7"), 256, 1, True, "8"), 256, "9")
    n4 = _c2f(net, net.concat([net.upsample(p5, name="10"), p4], 1, name="11"), 128, 1, False, "12")
    d3 = _c2f(net, net.concat([net.upsample(n4, name="13"), p3], 1, name="14"), 64, 1, False, "15")
    d4 = _c2f(net, net.concat([_silu(net, d3, 64, 3, 2, "16"), n4], 1, name="17"), 128, 1, False, "18")
    d5 = _c2f(net, net.concat([_silu(net, d4, 128, 3, 2, "19"), p5], 1, name="20"), 256, 1, False, "21")
    _v8_detect(net, (d3, d4, d5), classes)


def _silu(net: Net, x: str, out: int, kernel: int, stride: int, name: str, pad: int | None = None) -> str:
    return net.conv(x, out, kernel, stride, "silu", name=f"{name}/conv", pad=pad)


def _bottleneck(net: Net, x: str, shortcut: bool, kernels: tuple[int, int], name: str) -> str:
    c = net.shapes[x][1]
    y = _silu(net, _silu(net, x, c, kernels[0], 1, f"{name}/cv1"), c, kernels[1], 1, f"{name}/cv2")
    return net.add(x, y, name=f"{name}/add") if shortcut else y


def _c3(net: Net, x: str, out: int, depth: int, shortcut: bool, name: str) -> str:
    """Half the channels through bottlenecks, half past them."""
    a = _silu(net, x, out // 2, 1, 1, f"{name}/cv1")
    for i in range(depth):
        a = _bottleneck(net, a, shortcut, (1, 3), f"{name}/m/{i}")
    b = _silu(net, x, out // 2, 1, 1, f"{name}/cv2")
    return _silu(net, net.concat([a, b], 1, name=f"{name}/concat"), out, 1, 1, f"{name}/cv3")


def _c2f(net: Net, x: str, out: int, depth: int, shortcut: bool, name: str) -> str:
    """Half the channels through bottlenecks, and what each of them gives is kept."""
    parts = net.split(_silu(net, x, out, 1, 1, f"{name}/cv1"), [out // 2] * 2, 1, name=f"{name}/split")
    for i in range(depth):
        parts.append(_bottleneck(net, parts[-1], shortcut, (3, 3), f"{name}/m/{i}"))
    return _silu(net, net.concat(parts, 1, name=f"{name}/concat"), out, 1, 1, f"{name}/cv2")


def _sppf(net: Net, x: str, out: int, name: str) -> str:
    """Maxima over windows of 5, 9 and 13 pixels, beside each other."""
    parts = [_silu(net, x, net.shapes[x][1] // 2, 1, 1, f"{name}/cv1")]
    for i in range(3):
        parts.append(net.pool(parts[-1], 5, 1, pad=2, name=f"{name}/pool{i}"))
    return _silu(net, net.concat(parts, 1, name=f"{name}/concat"), out, 1, 1, f"{name}/cv2")


def _v5_rows(net: Net, x: str, level: int, classes: int) -> str:
    """Boxes of one map: xy = (2 y - 0.5 + place) stride, wh = (2 y)^2 anchor."""
    _, _, h, w = net.shapes[x]
    p, stride = f"24/{level}", STRIDES[level]
    x = net.conv(x, 3 * (5 + classes), 1, name=f"{p}/conv")
    x = net.transpose(net.reshape(x, 1, 3, 5 + classes, h, w, name=f"{p}/reshape"), 0, 1, 3, 4, 2, name=f"{p}/last")
    x = net.node("Sigmoid", [x], net.shapes[x], f"{p}/sigmoid")
    xy, wh, rest = net.split(x, [2, 2, 1 + classes], 4, name=f"{p}/split")
    grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1)[None, None].astype(np.float32) - np.float32(0.5)
    anchors = np.array(V5_ANCHORS[level], np.float32).reshape(1, 3, 1, 1, 2)
    xy = net.multiply(xy, net.number(2), name=f"{p}/xy/mul")
    xy = net.add(xy, net.constant(f"{p}/grid", grid), name=f"{p}/xy/add")
    xy = net.multiply(xy, net.number(stride), name=f"{p}/xy")
    wh = net.multiply(wh, net.number(2), name=f"{p}/wh/mul")
    wh = net.elementwise("Pow", wh, net.number(2), name=f"{p}/wh/pow")
    wh = net.multiply(wh, net.constant(f"{p}/anchors", anchors), name=f"{p}/wh")
    x = net.concat([xy, wh, rest], 4, name=f"{p}/concat")
    return net.reshape(x, 1, 3 * h * w, 5 + classes, name=p)


def _v8_detect(net: Net, maps: tuple[str, ...], classes: int) -> None:
    """Distances to a box's four sides are means over softmaxed bins (Generalized Focal Loss, arXiv:2006.04388)."""
    channels = net.shapes[maps[0]][1]
    wide, deep = max(16, channels // 4, 4 * V8_BINS), max(channels, min(classes, 100))
    flat = []
    for level, x in enumerate(maps):
        _, _, h, w = net.shapes[x]
        heads = []
        for branch, c, out in (("cv2", wide, 4 * V8_BINS), ("cv3", deep, classes)):
            p = f"22/{branch}/{level}"
            y = _silu(net, _silu(net, x, c, 3, 1, f"{p}/0"), c, 3, 1, f"{p}/1")
            heads.append(net.conv(y, out, 1, name=f"{p}/2"))
        y = net.concat(heads, 1, name=f"22/concat{level}")
        flat.append(net.reshape(y, 1, 4 * V8_BINS + classes, h * w, name=f"22/reshape{level}"))
    places = [np.stack(np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)).reshape(2, -1)
              for h, w in (net.shapes[x][2:] for x in maps)]
    centres = net.constant("22/centres", np.concatenate(places, 1)[None].astype(np.float32))
    strides = net.constant("22/strides", np.repeat(STRIDES, [p.shape[1] for p in places])[None].astype(np.float32))
    n = net.shapes[centres][2]
    box, scores = net.split(net.concat(flat, 2, name="22/concat"), [4 * V8_BINS, classes], 1, name="22/split")
    box = net.transpose(net.reshape(box, 1, 4, V8_BINS, n, name="22/dfl/reshape"), 0, 2, 1, 3, name="22/dfl/bins")
    box = net.node("Softmax", [box], net.shapes[box], "22/dfl/softmax", axis=1)
    bins = np.arange(V8_BINS, dtype=np.float32).reshape(1, V8_BINS, 1, 1)
    box = net.reshape(net.conv_of(box, bins, None, 1, 1, 0, "22/dfl/conv"), 1, 4, n, name="22/dfl")
    near, far = net.split(box, [2, 2], 1, name="22/sides")
    near = net.elementwise("Sub", centres, near, name="22/near")
    far = net.add(centres, far, name="22/far")
    xy = net.elementwise("Div", net.add(near, far, name="22/sum"), net.number(2), name="22/xy")
    wh = net.elementwise("Sub", far, near, name="22/wh")
    box = net.multiply(net.concat([xy, wh], 1, name="22/xywh"), strides, name="22/box")
    scores = net.node("Sigmoid", [scores], net.shapes[scores], "22/scores")
    net.output(net.concat([box, scores], 1, name="22"), "output0")


def ssdlite(net: Net, size: int, classes: int) -> None:
    """MobileNetV2 + SSDLite: SSD (Liu et al., arXiv:1512.02325) with separable heads (arXiv:1801.04381, section 6.2).

    Outputs: boxes 1,N,4 and classes 1,N,classes, neither decoded; class 0 is the background.
    """
    middle, x = mobilenet_v2_features(net, net.input("input", 1, 3, size, size))
    maps = [middle, x]
    for i, out in enumerate((512, 256, 256, 128)):
        x = net.conv(x, out // 2, 1, 1, "relu6", name=f"extra{i}/reduce")
        x = net.depthwise(x, 3, 2, "relu6", name=f"extra{i}/depthwise")
        x = net.conv(x, out, 1, 1, "relu6", name=f"extra{i}/expand")
        maps.append(x)
    for output, width in (("boxes", 4), ("classes", classes)):
        rows = []
        for i, (x, anchors) in enumerate(zip(maps, SSD_ANCHORS, strict=True)):
            _, _, h, w = net.shapes[x]
            p = f"{output}/{i}"
            y = net.conv(net.depthwise(x, 3, 1, "relu6", name=f"{p}/depthwise"), anchors * width, 1, name=f"{p}/conv")
            y = net.transpose(y, 0, 2, 3, 1, name=f"{p}/last")
            rows.append(net.reshape(y, 1, h * w * anchors, width, name=p))
        net.output(net.concat(rows, 1, name=f"{output}/concat"), output)
