"""Convolutional classifiers: an image in, a score a class out."""

from __future__ import annotations

from npulab.zoo.builder import Activation, Net

BRANCH = 0.1
"""Power of a residual branch beside its shortcut: many blocks in a row must not grow."""


def resnet50(net: Net, size: int, classes: int) -> None:
    """Deep Residual Learning (He et al., arXiv:1512.03385), table 1; the stride is the 3x3 convolution's, as in
    torchvision."""
    x = net.conv(net.input("input", 1, 3, size, size), 64, 7, 2, "relu", name="stem")
    x = net.pool(x, 3, 2, pad=1, name="stem/pool")
    for stage, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for i in range(depth):
            stride, p = (2 if i == 0 and stage > 1 else 1), f"layer{stage}/{i}"
            y = net.conv(x, width, 1, 1, "relu", name=f"{p}/conv1")
            y = net.conv(y, width, 3, stride, "relu", name=f"{p}/conv2")
            y = net.conv(y, 4 * width, 1, name=f"{p}/conv3", power=BRANCH)
            if i == 0:
                x = net.conv(x, 4 * width, 1, stride, name=f"{p}/shortcut", power=2)  # the ReLU halves it
            x = net.activate(net.add(x, y, name=f"{p}/add"), "relu")
    classify(net, x, classes)


def mobilenet_v1(net: Net, size: int, classes: int) -> None:
    """MobileNets (Howard et al., arXiv:1704.04861), table 1."""
    x = net.conv(net.input("input", 1, 3, size, size), 32, 3, 2, "relu", name="stem")
    blocks = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
    for i, (out, stride) in enumerate(blocks, 1):
        x = net.depthwise(x, 3, stride, "relu", name=f"block{i}/depthwise")
        x = net.conv(x, out, 1, 1, "relu", name=f"block{i}/pointwise")
    classify(net, x, classes)


def mobilenet_v2(net: Net, size: int, classes: int) -> None:
    """MobileNetV2 (Sandler et al., arXiv:1801.04381), table 2."""
    x = mobilenet_v2_features(net, net.input("input", 1, 3, size, size))[1]
    classify(net, x, classes)


def mobilenet_v2_features(net: Net, x: str) -> tuple[str, str]:
    """(the expansion at 1/16 of the size, 576 channels, where SSDLite takes it; the end at 1/32, 1280 channels)."""
    x = net.conv(x, 32, 3, 2, "relu6", name="stem")
    middle, i = "", 0
    for expand, out, repeats, first in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
                                        (6, 160, 3, 2), (6, 320, 1, 1)):
        for stride in (first, *(1,) * (repeats - 1)):
            i, p, shortcut = i + 1, f"block{i + 1}", x
            stays = stride == 1 and net.shapes[x][1] == out
            if expand > 1:
                x = net.conv(x, expand * net.shapes[x][1], 1, 1, "relu6", name=f"{p}/expand")
            if (out, stride) == (160, 2):
                middle = x
            x = net.depthwise(x, 3, stride, "relu6", name=f"{p}/depthwise")
            x = net.conv(x, out, 1, name=f"{p}/project", power=BRANCH if stays else 1)
            if stays:
                x = net.add(shortcut, x, name=f"{p}/add")
    return middle, net.conv(x, 1280, 1, 1, "relu6", name="head")


def mobilenet_v3(net: Net, size: int, classes: int) -> None:
    """Searching for MobileNetV3 (Howard et al., arXiv:1905.02244), table 1 (large)."""
    x = net.conv(net.input("input", 1, 3, size, size), 16, 3, 2, "hardswish", name="stem")
    r: Activation = "relu"
    h: Activation = "hardswish"
    rows: tuple[tuple[int, int, int, bool, Activation, int], ...] = (
        # kernel, expansion, out, squeeze and excitation, activation, stride
        (3, 16, 16, False, r, 1), (3, 64, 24, False, r, 2), (3, 72, 24, False, r, 1), (5, 72, 40, True, r, 2),
        (5, 120, 40, True, r, 1), (5, 120, 40, True, r, 1), (3, 240, 80, False, h, 2), (3, 200, 80, False, h, 1),
        (3, 184, 80, False, h, 1), (3, 184, 80, False, h, 1), (3, 480, 112, True, h, 1), (3, 672, 112, True, h, 1),
        (5, 672, 160, True, h, 2), (5, 960, 160, True, h, 1), (5, 960, 160, True, h, 1),
    )
    for i, (kernel, wide, out, gated, activation, stride) in enumerate(rows, 1):
        p, shortcut = f"block{i}", x
        stays = stride == 1 and net.shapes[x][1] == out
        if wide != net.shapes[x][1]:
            x = net.conv(x, wide, 1, 1, activation, name=f"{p}/expand")
        x = net.depthwise(x, kernel, stride, activation, name=f"{p}/depthwise")
        if gated:
            x = _squeeze_and_excite(net, x, f"{p}/se")
        x = net.conv(x, out, 1, name=f"{p}/project", power=(BRANCH if stays else 1) * (4 if gated else 1))
        if stays:
            x = net.add(shortcut, x, name=f"{p}/add")
    x = net.global_pool(net.conv(x, 960, 1, 1, h, name="head"), name="pool")
    x = net.linear(net.flatten(x, name="flatten"), 1280, h, name="classifier/0")
    net.output(net.linear(x, classes, name="classifier/1"), "output")


def _squeeze_and_excite(net: Net, x: str, p: str) -> str:
    """Each channel times a number between 0 and 1, found from the means of all: a quarter of them, multiples of 8."""
    c = net.shapes[x][1]
    squeezed = max(8, (c // 4 + 4) // 8 * 8)
    squeezed += 8 if squeezed < 0.9 * (c // 4) else 0
    y = net.conv(net.global_pool(x, name=f"{p}/pool"), squeezed, 1, 1, "relu", name=f"{p}/reduce")
    y = net.conv(y, c, 1, name=f"{p}/expand")
    y = net.node("HardSigmoid", [y], net.shapes[y], f"{p}/gate", alpha=1 / 6, beta=0.5)
    return net.multiply(x, y, name=p)


def squeezenet(net: Net, size: int, classes: int) -> None:
    """SqueezeNet (Iandola et al., arXiv:1602.07360), version 1.1 of its authors' repository."""
    x = net.conv(net.input("input", 1, 3, size, size), 64, 3, 2, "relu", name="stem", pad=0)
    for i, (squeeze, expand) in enumerate(((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256),
                                           (64, 256)), 2):
        if i in (2, 4, 6):
            x = net.pool(x, 3, 2, name=f"pool{i}", ceil=True)
        p = f"fire{i}"
        x = net.conv(x, squeeze, 1, 1, "relu", name=f"{p}/squeeze")
        x = net.concat([net.conv(x, expand, k, 1, "relu", name=f"{p}/expand{k}x{k}") for k in (1, 3)], 1, name=p)
    x = net.global_pool(net.conv(x, classes, 1, 1, "relu", name="classifier"), name="pool")
    net.output(net.flatten(x, name="flatten"), "output")


def classify(net: Net, x: str, classes: int) -> None:
    """Means of the channels, a fully connected layer, the output."""
    x = net.flatten(net.global_pool(x, name="pool"), name="flatten")
    net.output(net.linear(x, classes, name="classifier"), "output")
