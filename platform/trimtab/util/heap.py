"""Return of free heap memory to the operating system.

A process that allocates and frees arrays of changing sizes beside small objects that live on has more and more free memory in
its heap. The allocator of the C library does not return memory between objects by itself: an engine grew by 5 MB per minute.
"""

import ctypes
import threading
import time
from functools import cache

# A trim takes some milliseconds.
TRIM_SECONDS = 60.0


def trim_heap() -> bool:
    """Return the free memory of the heap to the operating system.

    Returns:
        True if memory was returned; False if there was none, or the C library has no such function.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim is not None and trim(0))


@cache
def start_heap_trimmer() -> threading.Thread:
    """Trim the heap every TRIM_SECONDS in a thread until the process ends; further calls return the same thread."""
    thread = threading.Thread(target=_trim_forever, name="trimtab-heap", daemon=True)
    thread.start()
    return thread


def _trim_forever() -> None:
    while True:
        time.sleep(TRIM_SECONDS)
        trim_heap()
