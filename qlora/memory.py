"""Memory of a run: what it did need. (What one will need, before it starts, comes later.)"""

import sys

import torch


def peak_bytes() -> int:
    """Most bytes held so far: allocated on the GPU where there is one, else this process's RSS."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def show_bytes(count: int) -> str:
    """`1.23 GiB`, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
