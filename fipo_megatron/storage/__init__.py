"""Files that survive a crash: atomic writes, published directories, checksums and JSON lines."""
