"""What there is to choose from, whatever is computed: candidates, and the modules that make kernels of them."""

from __future__ import annotations

from collections.abc import Sequence

from npulab.gpu.compute import attention, integer_attention, integers, modules_shapes, tiles
from npulab.gpu.compute.attention_cpu import Lanes
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.integers import Integer
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.tiles import Direct, Matrix, Winograd
from npulab.gpu.compute.types import Traits

Choice = Matrix | Direct | Winograd | Integer | Lanes | Items
"""Each has a tag of its own."""
Kept = Choice | modules_shapes.Choice
"""How it is written in the store."""
Work = Convolution | Product | Attention


def candidates(what: Work, traits: Traits, halves: bool = False) -> Sequence[Choice]:
    """The likely best first; none where there is nothing to choose, or no room. halves: as of `tiles.candidates`.
    Raises: as the kernels' own."""
    match what:
        case Attention(number="int8"):
            return integer_attention.candidates(what, traits)
        case Attention():
            return attention.candidates(what, traits, halves)
        case Convolution(number="int8"):
            return integers.candidates(what, traits)
        case Product(number="int8"):
            return integers.candidates(integers.as_convolution(what), traits)
    return tiles.candidates(what, traits, halves)


def makers(what: Work) -> tuple[str, ...]:
    """Modules of this folder that make its kernels: times of other versions of them are of no use."""
    match what:
        case Attention(number="int8"):
            return ("attention", "attention_cpu", "attention_gpu", "integer_attention", "integer_attention_cpu",
                    "integer_attention_gpu", "vectors")
        case Attention():
            return "attention", "attention_cpu", "attention_gpu", "vectors"
        case Convolution(number="int8") | Product(number="int8"):
            return "integer_blocks", "integer_winograd", "integers", "vectors", "winograd"
    return "activations", "blocks", "convolution", "matrices", "narrow", "vectors", "winograd"
