"""Plan reference against the recorded bytes of the open driver, through the command line."""

import subprocess
import sys
from pathlib import Path

from shared import SHARED, needs_shared


@needs_shared
def test_every_golden_case_is_reproduced_byte_for_byte():
    command = Path(sys.executable).with_name("npulab")

    done = subprocess.run(
        [sys.executable, SHARED / "tools" / "compare_golden.py", "--npu", "a311d", "--npulab", str(command)],
        capture_output=True, text=True, timeout=600,
    )

    assert done.stdout.splitlines()[-1] == "185 passed, 0 failed", done.stdout[-2000:] + done.stderr[-2000:]
