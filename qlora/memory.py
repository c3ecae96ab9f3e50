"""Memory of a run: what it did need. (What one will need, before it starts, comes later.)"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch


def device() -> tuple[str, int | None]:
    """Name and bytes of memory of what computes: the GPU, or the CPU; None if not known."""
    if torch.cuda.is_available():
        found: Any = torch.cuda.get_device_properties()
        return str(found.name), int(found.total_memory)
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return "CPU", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "CPU", None


def peak_bytes() -> int:
    """Most bytes held so far: allocated on the GPU where there is one, else resident in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most bytes of this process that were resident in memory at once."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage would begin with the peak of the parent process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def show_bytes(count: int) -> str:
    """`1.23 GiB`, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
