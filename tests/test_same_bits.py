"""Equal input gives equal bytes, whatever Python's hash seed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples" / "digits.tflite"
CODE = """
import hashlib, sys, npulab
from npulab.program.container import program_bytes
for plan in ("best", "reference"):
    print(hashlib.sha256(program_bytes(npulab.compile(npulab.load(sys.argv[1]), plan=plan))).hexdigest())
"""


def test_twenty_compiles_under_different_hash_seeds_are_byte_identical():
    digests = set()
    for seed in range(20):
        env = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run([sys.executable, "-c", CODE, SAMPLE], env=env, capture_output=True, text=True, check=True)
        digests.add(done.stdout)

    assert len(digests) == 1
    assert len(next(iter(digests)).split()) == 2
    assert hashlib.sha256(b"").hexdigest() not in next(iter(digests))
