"""Chaos benchmark of training and serving: recovery from processes that are killed with SIGKILL.

python bench/chaos.py [--quick] [--only NAME] [--json FILE]

Training: a submitted job with three workers runs on a cluster of three nodes, which are processes of this machine. Serving: two
replicas answer four clients, and an MLflow server on PostgreSQL stores the versions. Each process is killed once per round. A
round of training ends with the next checkpoint. A round of serving ends when no request has failed for some seconds.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from peers import learning_chaos, serving_chaos
from peers.homes import own_home

TRAINING_TARGETS = ("train worker", "driver", "raylet")
SERVING_TARGETS = ("engine core", "replica", "controller", "HAProxy", "MLflow", "PostgreSQL")
ROUNDS, QUICK_ROUNDS = 10, 2


def main() -> None:
    options = parse_arguments()
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        own_home(Path(name))
        if options.only in (None, *TRAINING_TARGETS):
            lines += learning_chaos.measure_training_recovery(options.base, rounds, options.only, Path(name))
        if options.only in (None, *SERVING_TARGETS):
            lines += serving_chaos.measure_serving_recovery(options.base, rounds, options.only)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds per process")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="number of kills per process")
    parser.add_argument("--only", choices=[*TRAINING_TARGETS, *SERVING_TARGETS], help="kill this process only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
