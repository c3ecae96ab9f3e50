"""Peak memory against an allocation of known size, in a process of its own."""

import subprocess
import sys

import psutil
import torch

from qlora.training.outputs import device, show_bytes

CHILD = """
import numpy
from qlora.training.outputs import peak_resident_bytes
before = peak_resident_bytes()
numpy.ones(300_000_000, dtype=numpy.uint8)
print(peak_resident_bytes() - before)
"""


def test_peak_counts_what_was_given_back_and_not_the_parent():
    ballast = bytearray(b"x" * 700_000_000)  # the parent's own, touched
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True)
    assert 290_000_000 < int(done.stdout) < 400_000_000
    assert len(ballast) == 700_000_000


def test_what_there_is():
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        assert device() == (torch.cuda.get_device_name(), total)
    else:
        assert device() == ("CPU", psutil.virtual_memory().total)


def test_bytes_are_shown_in_gib_or_mib():
    assert show_bytes(5 * 2**29) == "2.50 GiB"
    assert show_bytes(300 * 2**20) == "300 MiB"
