"""Starts SGLang as its own environment's Python: ``python start.py PARENT MODULE ARGUMENTS``.

Asks the kernel to end it when the process that started it is gone, however that ended; SGLang's children do the same.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that should watch this server is gone already")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
