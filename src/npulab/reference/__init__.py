"""What quantized networks mean, exactly: every operator in integers, with the rounding of whoever computes it.

Slow and obvious on purpose, vectorized so that it can be run over hundreds of images. `execute.run` runs a Graph; each
other file is one subject. What it is compared with, and what no witness covers, is in docs/arithmetic.md.
"""

from npulab.reference.execute import Network, prepare, run

__all__ = ["Network", "prepare", "run"]
