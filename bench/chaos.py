"""What people see when processes are killed as by `kill -9`: while a prefix is learned, and while a server is asked.

python bench/chaos.py [--quick] [--only NAME] [--json FILE]

Learning: a submitted job of three workers on a cluster of three nodes, which are processes of this machine. Serving: two
replicas that answer four clients, with versions in an MLflow server on PostgreSQL. Each process is killed round by round; a
round ends when the next checkpoint is there, or when all clients were answered for a while.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from peers import learning_chaos, serving_chaos
from peers.homes import own_home

LEARNING = ("train worker", "driver", "raylet")
SERVING = ("engine core", "replica", "controller", "HAProxy", "MLflow", "PostgreSQL")
ROUNDS, QUICK = 10, 2


def main() -> None:
    options = arguments()
    count = QUICK if options.quick else options.rounds
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        own_home(Path(name))
        if options.only in (None, *LEARNING):
            lines += learning_chaos.chaos(options.base, count, options.only, Path(name))
        if options.only in (None, *SERVING):
            lines += serving_chaos.chaos(options.base, count, options.only)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds of each")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is killed")
    parser.add_argument("--only", choices=[*LEARNING, *SERVING], help="kill nothing else")
    return parser.parse_args()


if __name__ == "__main__":
    main()
