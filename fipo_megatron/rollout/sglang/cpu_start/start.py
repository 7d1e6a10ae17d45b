"""Starts a module of SGLang in its environment: ``python start.py PARENT MODULE ARGUMENTS``.

The kernel kills the process when the process that started it, PARENT, has ended for any reason; SGLang's children do
the same.
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
