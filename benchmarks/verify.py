"""Runs all tests with many more examples per property, and writes the outcome with its date.

python -m benchmarks.verify
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from benchmarks.result_table import write_result

THOROUGH = {
    "HYPOTHESIS_PROFILE": "thorough",
    "FIPO_SGLANG_REQUESTS": "500",
    "FIPO_HOSTILE_ANSWERS": "10000",
    "FIPO_FUZZ_INPUTS": "5000",
    "FIPO_FAIL_POINTS": "response:9,reward:30,sync:2,log_probs:1,save:1,checkpoint_write:1,checkpoint_publish:1,"
    "checkpoint_published:1,update:2,observe:1,generate:2,response:20,checkpoint_published:1",
    "FIPO_RANDOM_KILLS": "20",
    "FIPO_LOST_RANKS": "all",
    "FIPO_RUN_FILE_MUTATIONS": "500",
    "FIPO_VERDICT_SCHEDULES": "200",
}


def main() -> int:
    """Runs the tests under the ``thorough`` profile of tests/conftest.py; returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "--timeout", "3600", *sys.argv[1:]]
    process = subprocess.Popen(command, env=os.environ | THOROUGH, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    code = process.wait()
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    write_result("verify", {"examples_per_property": 500, "outcome": counts, "exit_code": code, "summary": last})
    return code


if __name__ == "__main__":
    sys.exit(main())
