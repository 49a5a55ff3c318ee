"""What the encoder may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

FEATURES: Mapping[str, str] = MappingProxyType({
    "tiles": "tiles of other sizes than the driver's rule gives, inside the same buffers",
    "zero-runs-1x1": "zero runs in the streams of 1x1 kernels, where the driver never tries them",
    "stride-2": "a stride of 2 either way for every kernel: space-to-depth, or one pixel of four of a full convolution",
    "tp-split": "transposes cut over all TP cores, as the driver cuts reshuffles",
    "axi-sram": "tensors in the on-chip SRAM that the vendor's streams map at 4 MiB, jobs ordered for it",
    "tp-table": "functions of one number (LOGISTIC and others) as table jobs of the TP engine",
    "cascade": "chains and trees of convolutions in stripes, what lies between them in that SRAM (includes axi-sram)",
})
"""What plan best leaves alone unless asked, because no recorded stream shows it: all of it is inferred."""


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How streams and caches are chosen. `optimal_zero_runs` False repeats the reference driver's search.

    `features` are those of FEATURES that the user allows.
    """

    optimal_zero_runs: bool = True
    zero_runs: bool = True
    kernel_cache: bool = True
    image_cache: bool = True
    features: frozenset[str] = frozenset()
