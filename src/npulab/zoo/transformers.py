"""Vision transformers."""

from __future__ import annotations

import numpy as np

from npulab.zoo.builder import Net
from npulab.zoo.classifiers import BRANCH

WIDTH, DEPTH, HEADS, PATCH = 192, 12, 3, 16


def vit_tiny(net: Net, size: int, classes: int) -> None:
    """ViT (Dosovitskiy et al., arXiv:2010.11929) as wide as DeiT-Ti (Touvron et al., arXiv:2012.12877, table 1)."""
    x = net.conv(net.input("input", 1, 3, size, size), WIDTH, PATCH, PATCH, name="patches", pad=0)
    x = net.reshape(x, 1, WIDTH, (size // PATCH)**2, name="patches/reshape")
    x = net.transpose(x, 0, 2, 1, name="patches/tokens")
    x = net.concat([net.constant("class_token", net.normal((1, 1, WIDTH), 1)), x], 1, name="tokens")
    x = net.add(x, net.constant("positions", net.normal(net.shapes[x], 0.2)), name="embedding")
    for i in range(DEPTH):
        p = f"block{i}"
        y = _attention(net, _norm(net, x, f"{p}/norm1"), f"{p}/attention")
        x = net.add(x, y, name=f"{p}/add1")
        y = net.linear(_norm(net, x, f"{p}/norm2"), 4 * WIDTH, "gelu", name=f"{p}/mlp/0")
        x = net.add(x, net.linear(y, WIDTH, name=f"{p}/mlp/1", power=BRANCH), name=f"{p}/add2")
    x = _norm(net, x, "norm")
    x = net.node("Gather", [x, net.constant("first", np.array(0, np.int64))], (1, WIDTH), "class", axis=1)
    net.output(net.linear(x, classes, name="classifier"), "output")


def _norm(net: Net, x: str, name: str) -> str:
    scale = net.constant(f"{name}.scale", net.normal((WIDTH,), 0.1, 1))
    return net.node("LayerNormalization", [x, scale, net.constant(f"{name}.shift", net.normal((WIDTH,), 0.1))],
                    net.shapes[x], name, axis=-1, epsilon=1e-6)


def _attention(net: Net, x: str, p: str) -> str:
    """softmax(q k / sqrt d) v, for each head."""
    n, d = net.shapes[x][1], WIDTH // HEADS
    x = net.reshape(net.linear(x, 3 * WIDTH, name=f"{p}/qkv"), 1, n, 3, HEADS, d, name=f"{p}/heads")
    x = net.transpose(x, 2, 0, 3, 1, 4, name=f"{p}/threes")
    q, k, v = (net.node("Gather", [x, net.constant(f"index_{i}", np.array(i, np.int64))], (1, HEADS, n, d),
                        f"{p}/{name}", axis=0) for i, name in enumerate("qkv"))
    q = net.multiply(q, net.number(d**-0.5), name=f"{p}/scale")
    k = net.transpose(k, 0, 1, 3, 2, name=f"{p}/keys")
    x = net.node("MatMul", [q, k], (1, HEADS, n, n), f"{p}/scores")
    x = net.node("Softmax", [x], (1, HEADS, n, n), f"{p}/softmax", axis=-1)
    x = net.transpose(net.node("MatMul", [x, v], (1, HEADS, n, d), f"{p}/values"), 0, 2, 1, 3, name=f"{p}/last")
    x = net.reshape(x, 1, n, WIDTH, name=f"{p}/join")
    return net.linear(x, WIDTH, name=f"{p}/project", power=4 * BRANCH)  # an average of values has less power
