"""What compiled code really does, counted by going through it: machine code, PTX, SPIR-V.

A loop's trips, its unrolling, its remainder and the loops over work items around it are not looked for. The code is
followed instead, its integers computed as the device would, once with fewer turns of the experiment's loop and once
with more; what it did more is what the turns do (`npulab.gpu.counting.turns`). Numbers that hang on data stay unknown,
and code whose way hangs on them is not counted.
"""

from npulab.gpu.counting.mix import SUMS, Asked, Counted
from npulab.gpu.counting.opencl import count
from npulab.gpu.counting.turns import DIVIDED, PRODUCTS, PROVEN, STATED, UNREAD, objection, source, work

__all__ = ["DIVIDED", "PRODUCTS", "PROVEN", "STATED", "SUMS", "UNREAD", "Asked", "Counted", "count", "objection",
           "source", "work"]
