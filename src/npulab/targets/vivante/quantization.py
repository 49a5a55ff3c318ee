"""What the chips take of a network of integers, as plan best has it (constraints.py)."""

from __future__ import annotations

from npulab.quantization.types import Rules, Scheme
from npulab.targets.facts.quantization import FIXED_TFLITE, KERNELS, LITERT, SAME_TFLITE
from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.constraints import ENGINE, TEFLON

EIGHT_BITS = (Scheme(8, False), Scheme(8, True))
"""One scale and one zero point for the whole tensor; int8 weights are moved into the engine's unsigned domain."""


def rules(chip: Chip) -> Rules:
    """uint8 or int8 per tensor, weights and data, any zero point; what TFLite prescribes holds for the host's part."""
    return Rules(
        chip.name, chip.title, "tflite", EIGHT_BITS, EIGHT_BITS, "multiplier16", FIXED_TFLITE, same_scale=SAME_TFLITE,
        requantize_below=2.0**8,
        sources={**dict.fromkeys(("activations", "weights", "bias_bits", "arithmetic", "requantize_below"), ENGINE),
                 "fixed": LITERT, "same_scale": LITERT, "accumulator_bits": KERNELS, "file": TEFLON,
                 "float_islands": TEFLON})
