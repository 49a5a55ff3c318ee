"""Compiles models in Vela's own environment, one process each, and says where their operators went; for `vela.py`.

Reads JSON lines [path, accelerator, listed] from stdin. For each it writes one JSON line: [status, operators on the
CPU, operators on the NPU, {output tensor: "npu" or "host"} of what Vela lists if `listed`, the end of a failure].
"""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile

from ethosu.vela import vela

LINE = re.compile(r"^\s*(CPU|NPU): (\S+) = (.*?)(?: \(outputs .*)?$", re.M)
COUNT = re.compile(r"^(CPU|NPU) operators = (\d+)", re.M)
SECONDS_MAX = 120


def compiled(path, accelerator, listed):
    """The status of a process of its own, and what it wrote."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        signal.alarm(SECONDS_MAX)
        for stream in (1, 2):
            os.dup2(write, stream)
        status = 1
        with contextlib.suppress(BaseException), tempfile.TemporaryDirectory() as folder:
            options = ["--show-cpu-operations"] if listed else []
            try:
                vela.main([path, "--accelerator-config", accelerator, *options, "--output-dir", folder])
                status = 0
            except BaseException as e:
                print(repr(e))
        sys.stdout.flush()
        os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        text = f.read().decode(errors="replace")
    return os.waitpid(child, 0)[1], text


for line in sys.stdin:
    status, text = compiled(*json.loads(line))
    counts = dict(COUNT.findall(text))
    places = {name: "npu" if side == "NPU" else "host" for side, _, name in LINE.findall(text)}
    print(json.dumps([status, int(counts.get("CPU", 0)), int(counts.get("NPU", 0)), places,
                      text[-200:] if status else ""]), flush=True)
