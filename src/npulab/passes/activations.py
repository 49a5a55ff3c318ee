"""The passes on activations, fused ones first, then in parts, then others in their place; and on plain arithmetic."""

from __future__ import annotations

from npulab.passes import arithmetic, gelu, hard_swish, mish, rectifiers, silu

PASSES = (*silu.PASSES, *hard_swish.PASSES, *mish.PASSES, *gelu.PASSES, *rectifiers.PASSES,
          *arithmetic.PASSES)
