"""What a process has in memory that is its own."""

from __future__ import annotations

from pathlib import Path


def anonymous(process_id: int) -> int:
    """RssAnon, bytes: neither files that are mapped nor what is shared by them; 0 where the process is gone."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
