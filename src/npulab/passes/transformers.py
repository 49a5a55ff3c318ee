"""The passes on what transformers are made of, in the order in which they help each other."""

from __future__ import annotations

from npulab.passes import attention, einsum, gather, group_norm, layer_norm, matmul, rank, softmax, transposes

PASSES = (*transposes.PASSES, *attention.PASSES, einsum.PASS, *matmul.PASSES, gather.PASS, *layer_norm.PASSES,
          *group_norm.PASSES, *softmax.PASSES, *rank.PASSES)
