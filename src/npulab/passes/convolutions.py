"""The passes on convolutions, pools and resizing, in the order in which they help each other."""

from __future__ import annotations

from npulab.passes import (
    blocks,
    dilation,
    groups,
    joins,
    normalization,
    pad_channels,
    pools,
    products,
    split_kernel,
    split_tensor,
    square,
    strides,
    transposed,
    upsample,
)
from npulab.passes.types import Pass

PASSES: tuple[Pass, ...] = (
    normalization.PASS, pools.FLOOR,
    # as many multiplications as before
    normalization.PAD, joins.SPLIT, joins.CONCAT, dilation.PHASES, transposed.ONES, transposed.RESIZE,
    transposed.DEPTH, upsample.DEPTH, upsample.TRANSPOSED, upsample.EXPAND, upsample.MATMUL, blocks.FROM_TRANSPOSE,
    blocks.TO_TRANSPOSE, pools.PAIRS, pools.GLOBAL, pools.CHAIN, pools.AVERAGE, pools.MEAN, pools.CONVOLUTION,
    products.CONVOLUTION, products.GEMM, strides.TWOS, groups.TO_DEPTHWISE, groups.SPLIT,
    # more of them; channels before kernels before strides, since what one leaves another may clear
    groups.DENSE, groups.FROM_DEPTHWISE, dilation.DENSE, square.SAME, square.SQUARE, split_kernel.PASS,
    split_kernel.SMALL, strides.POOL, strides.SLICE, split_tensor.ROWS, split_tensor.CHANNELS, pad_channels.PASS,
)
