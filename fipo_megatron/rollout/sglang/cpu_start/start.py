"""Starts a module of SGLang in its environment: ``python start.py PARENT MODULE ARGUMENTS``.

The kernel kills the process when the process that started it, PARENT, has ended for any reason; SGLang's children do
the same. Arguments that are secret stand in an environment variable, because everybody can read command lines; SGLang
takes them from nowhere else, and logs them.
"""

import ctypes
import json
import logging
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1
_SECRET_ARGUMENTS = "FIPO_SGLANG_SECRET_ARGUMENTS"


def _hide(secrets):
    """Replaces secrets in what this process logs."""
    create = logging.getLogRecordFactory()

    def record(*arguments, **options):
        found = create(*arguments, **options)
        text = found.getMessage()
        if any(secret in text for secret in secrets):
            for secret in secrets:
                text = text.replace(secret, "…")
            found.msg, found.args = text, ()
        return found

    logging.setLogRecordFactory(record)


if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm sends them to every process of a step
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that should watch this server is gone already")
    options = json.loads(os.environ.pop(_SECRET_ARGUMENTS, "{}"))
    _hide([*options.values()])
    module = sys.argv[2]
    sys.argv[1:] = [*sys.argv[3:], *(text for option, value in options.items() for text in (option, value))]
    sys.path[0] = ""  # as python -m sets it, instead of the directory of this file
    runpy.run_module(module, run_name="__main__", alter_sys=True)
