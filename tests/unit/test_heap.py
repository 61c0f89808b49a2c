"""Free heap memory is returned to the operating system."""

import subprocess
import sys

# Freed arrays between objects that live on, in a process of its own: other tests have a heap of any state.
CODE = """
import numpy, psutil
from trimtab.util import heap
heap.TRIM_SECONDS = 0.1
arrays = [numpy.ones(12_000 if i % 2 else 100) for i in range(4_000)]
small = arrays[::2]
process = psutil.Process()
del arrays
held = process.memory_info().rss
assert heap.start_heap_trimmer() is heap.start_heap_trimmer()
import time
deadline = time.monotonic() + 30
while process.memory_info().rss > held - 100e6:
    assert time.monotonic() < deadline
print("returned")
"""


def test_thread_returns_free_memory():
    completed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert completed.stdout == "returned\n", completed.stderr
