"""Private memory of a process."""

from __future__ import annotations

from pathlib import Path


def anonymous(process_id: int) -> int:
    """Returns RssAnon in bytes, which counts neither mapped files nor shared memory; 0 if the process has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
