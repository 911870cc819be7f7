"""How much main memory is free, also within a container."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path('/sys/fs/cgroup')


def free_memory() -> int | None:
    """Bytes of main memory that are free for this process; None where not known.

    What Linux calls available; less where the control group has a limit.
    """
    lines = dict(
        line.split(':', 1)
        for line in read_text('/proc/meminfo').splitlines()
        if ':' in line
    )
    if 'MemAvailable' not in lines:
        return None
    free = int(lines['MemAvailable'].split()[0]) * 1024
    limit, used = (read_text(CGROUP / f'memory.{what}') for what in ('max', 'current'))
    if limit.isdigit() and used.isdigit():
        caches = [
            int(line.split()[1])
            for line in read_text(CGROUP / 'memory.stat').splitlines()
            if line.startswith('inactive_file ')
        ]
        free = min(free, int(limit) - int(used) + sum(caches))
    return free


def read_text(path: str | Path) -> str:
    """A small file's text without white space around it; '' where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ''
