"""The GPUs of this node: what the driver, torch and the kernel log say about them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fipo_megatron.preflight.node_facts import GpuFacts
from fipo_megatron.storage.json_files import one_line

_COLUMNS = (
    "index",
    "name",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "retired_pages.pending",
    "memory.total",
)
_MIB = 2**20
_SMI_SECONDS = 30.0

FAULTS = {
    46: "the GPU stopped processing",
    48: "an uncorrectable memory error",
    62: "the GPU's micro-controller halted",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    95: "an uncontained memory error",
    119: "the GPU's system processor did not answer",
    120: "an error of the GPU's system processor",
    140: "an unrecovered memory error",
    143: "the GPU could not be initialised",
}
"""Xid errors of the hardware or its firmware, which a restart of the program does not mend."""

LOG_HOURS = 24.0
"""Age in hours up to which an Xid error counts; a GPU has most likely been reset after an older one."""

_XID = re.compile(r"NVRM: Xid \((?P<gpu>[^)]*)\): (?P<number>\d+)")


def gpu_facts(kernel_log: Path = Path("/dev/kmsg")) -> GpuFacts:
    """Asks nvidia-smi, torch and the kernel log of this node. Without a driver no log is read.

    Args:
        kernel_log: The kernel's log, in the format of ``/dev/kmsg``.
    """
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    slurm = os.environ.get("SLURM_GPUS_ON_NODE", "")
    given = int(slurm) if slurm.isdecimal() else None
    program = shutil.which("nvidia-smi")
    if program is None:
        return GpuFacts(usable=usable, given=given, problem="nvidia-smi is not in PATH" if usable else "")
    command = [program, f"--query-gpu={','.join(_COLUMNS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return GpuFacts(usable=usable, given=given, problem=f"nvidia-smi: {one_line(error)}")
    if done.returncode:
        text = one_line(done.stdout.strip() or done.stderr.strip() or "no message")
        return GpuFacts(usable=usable, given=given, problem=f"nvidia-smi ended with {done.returncode}: {text}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    rows = [row for row in rows if len(row) == len(_COLUMNS)]
    xids, log_problem = _read_kernel_log(kernel_log)
    return GpuFacts(
        names=tuple(row[1] for row in rows),
        driver=rows[0][2] if rows else "",
        usable=usable,
        memory=tuple(int(row[-1]) * _MIB for row in rows if row[-1].isdecimal()),
        given=given,
        errors=tuple(memory_errors(rows)),
        kernel_log=xids,
        kernel_log_problem=log_problem,
    )


def memory_errors(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yields a sentence for each memory error of a GPU; values that a GPU does not have are ``[N/A]``."""
    for index, _, _, uncorrected, remap_pending, remap_failure, page_pending, *_ in rows:
        if uncorrected.isdecimal() and int(uncorrected):
            yield f"GPU {index} has {uncorrected} uncorrected memory errors since the driver was loaded"
        if _is_set(remap_failure):
            yield f"GPU {index} could not remap a memory row"
        if _is_set(remap_pending) or _is_set(page_pending):
            yield f"GPU {index} has a memory remapping that waits for a reset"


def _is_set(value: str) -> bool:
    return value.lower() == "yes" or (value.isdecimal() and int(value) > 0)


def _read_kernel_log(path: Path) -> tuple[tuple[str, ...] | None, str]:
    """Returns the hardware's Xid errors in the kernel log, or None and why the log cannot be read."""
    records = []
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    try:
        while True:
            try:
                record = os.read(handle, 8192)  # one record of /dev/kmsg; a part of an ordinary file
            except BlockingIOError:
                break
            except BrokenPipeError:  # the record was overwritten meanwhile; the next read goes on after it
                continue
            if not record:
                break
            records.append(record)
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    finally:
        os.close(handle)
    return tuple(xid_errors(b"".join(records).decode(errors="replace"), time.clock_gettime(time.CLOCK_BOOTTIME))), ""


def xid_errors(log: str, uptime: float) -> Iterator[str]:
    """Yields a sentence for each recent Xid error of the hardware.

    Args:
        log: Records of ``/dev/kmsg``: ``level,number,microseconds since boot,flags;text``.
        uptime: Seconds since boot.
    """
    for line in log.splitlines():
        head, _, text = line.partition(";")
        found = _XID.search(text)
        if found is None or int(found["number"]) not in FAULTS:
            continue
        parts = head.split(",")
        hours = (uptime - int(parts[2]) / 1e6) / 3600 if len(parts) > 2 and parts[2].isdecimal() else 0.0
        if hours <= LOG_HOURS:
            number = int(found["number"])
            yield f"{found['gpu']} had Xid {number} ({FAULTS[number]}) {hours:.1f} hours ago"
