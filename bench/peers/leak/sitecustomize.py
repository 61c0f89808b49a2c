"""Leak for `bench/soak.py --leak`: every Ray worker that imports this module at its start grows steadily."""

import os
import sys
import threading
import time

BLOCK_BYTES = 64 << 10
leaked: list[bytes] = []


def grow(bytes_per_second: float) -> None:
    began = time.monotonic()
    while True:
        time.sleep(1)
        while len(leaked) * BLOCK_BYTES < (time.monotonic() - began) * bytes_per_second:
            # Random, so that the pages are resident and differ.
            leaked.append(os.urandom(BLOCK_BYTES))


if "default_worker.py" in " ".join(sys.orig_argv):
    rate = float(os.environ["SOAK_LEAK_MB_PER_MINUTE"]) * 1e6 / 60
    threading.Thread(target=grow, args=(rate,), daemon=True).start()
