"""Mutation score of ten core modules: the share of small faults in their code that the tests without an engine catch.

python bench/mutation.py [--module NAME ...] [--quick] [--out FOLDER] [--json FILE]

Cosmic Ray makes the mutants. Of the mutants at one place and of one kind, for example the replacements of one operator, one is
chosen; of those that remain, at most 60 per module are sampled with a fixed seed. The sample depends on the code of the module
only, so that scores before and after a change of the tests compare. Mutants of `|` are left out, because most are type
annotations. A run that was interrupted continues with the results in the output folder. Survivors are printed as diffs.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from cosmic_ray.work_db import WorkDB, use_db  # pyright: ignore[reportMissingTypeStubs]
from cosmic_ray.work_item import TestOutcome, WorkItem  # pyright: ignore[reportMissingTypeStubs]
from faults import LINKED, ROOT, copy_repository

SAMPLE, SEED, GOAL = 60, 0, 0.85
# Copies of the repository in which mutants are tested side by side.
COPIES = 2
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Target:
    """Module to mutate, and the test files to run against each mutant; paths in the repository."""

    module: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Result of a module: number of tested mutants, and diffs of those that survived."""

    tested: int
    survivors: list[str]

    @property
    def value(self) -> float:
        """Share of killed mutants."""
        return 1 - len(self.survivors) / self.tested


ENGINE, MODEL = "tests/unit/engine", "tests/unit/model"
TARGETS = {
    "token guard": Target("platform/trimtab/engine/prefixes/token_guard.py", (f"{ENGINE}/test_token_guard.py",)),
    "prefix slots": Target("platform/trimtab/engine/prefixes/slots.py", (f"{ENGINE}/test_prefix_slots.py",)),
    "chat template": Target(
        "platform/trimtab/model/chat_template.py",
        (f"{MODEL}/test_chat.py", f"{MODEL}/test_prefix_tree.py", "tests/integration/engine/test_model_families.py"),
    ),
    "hard filter": Target(
        "platform/trimtab/data/hard_filter.py", ("tests/unit/data/test_hard_filter.py", "tests/unit/data/test_prompt.py")
    ),
    "promotion rules": Target(
        "platform/trimtab/evaluation/promotion_rules.py", ("tests/unit/evaluation/test_promotion_rules.py",)
    ),
    "signals": Target(
        "platform/trimtab/detection/signals.py", ("tests/unit/artifacts/test_signals.py", f"{ENGINE}/test_signal_capture.py")
    ),
    "calibration": Target("platform/trimtab/detection/calibration.py", ("tests/unit/detection/test_calibration.py",)),
    "response rewriter": Target(
        "platform/trimtab/engine/openai/response_rewriter.py", (f"{ENGINE}/test_response_rewriter.py",)
    ),
    "authentication": Target("serve/middleware/authentication.py", ("tests/unit/serve/test_authentication.py",)),
    "checkpoints": Target("jobs/align/checkpoints.py", ("tests/unit/jobs/test_checkpoints.py",)),
}


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trimtab-mutation-") as folder:
        copies = Queue[Path]()
        for number in range(COPIES):
            copies.put(copy_repository(Path(folder) / str(number)))

        def measure(name: str) -> Score:
            copy = copies.get()
            try:
                return measure_score(name, TARGETS[name], copy, options.out, 3 if options.quick else SAMPLE)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(COPIES) as pool:
            scores = dict(zip(options.module, pool.map(measure, options.module), strict=True))
    for name, score in scores.items():
        for diff in score.survivors:
            print(f"{name}: survived\n{diff}\n")
    lines = build_report(scores)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", nargs="+", choices=TARGETS, default=list(TARGETS), help="modules to mutate")
    parser.add_argument("--quick", action="store_true", help="3 mutants per module")
    parser.add_argument("--out", type=Path, default=ROOT / ".mutation", help="folder of the results so far")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def measure_score(name: str, target: Target, copy: Path, out: Path, size: int) -> Score:
    """Test the sample of a module.

    Args:
        name: name of the module in messages.
        target: module and tests.
        copy: copy of the repository to mutate.
        out: folder of the results so far.
        size: maximum number of mutants.

    Raises:
        SystemExit: if the tests fail without a mutant.
    """
    test_command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy / LINKED), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    session, config = out / f"{name.replace(' ', '-')}-{size}.sqlite", out / f"{name.replace(' ', '-')}.toml"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "{target.module}"\ntimeout = {TIMEOUT_SECONDS}\nexcluded-modules = []\n'
        f'test-command = "{shlex.join([*test_command, *target.tests])}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )

    def run(*command: str) -> None:
        completed = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if completed.returncode:
            output = completed.stdout[-2000:] + completed.stderr[-2000:]
            raise SystemExit(f"mutation of {name} failed: {' '.join(command)}: {output}")

    run(sys.executable, "-m", "cosmic_ray.cli", "baseline", str(config))
    if not session.exists():
        run(sys.executable, "-m", "cosmic_ray.cli", "init", str(config), str(session))
        with use_db(session, WorkDB.Mode.open) as database:
            items = list(database.work_items)
            sample = sample_items(items, size)
            database.clear()
            database.add_work_items(sample)
    print(f"{name} ...", flush=True)
    run(sys.executable, "-m", "cosmic_ray.cli", "exec", str(config), str(session))
    with use_db(session, WorkDB.Mode.open) as database:
        results = [result for _, result in database.results]
    if any(result.test_outcome == TestOutcome.INCOMPETENT for result in results):
        raise SystemExit(f"mutation of {name} failed: some mutants could not be tested. Delete {session}")
    return Score(len(results), [result.diff or "" for result in results if result.test_outcome == TestOutcome.SURVIVED])


def sample_items(items: Sequence[WorkItem], size: int) -> list[WorkItem]:
    """Sample mutants, at most one of each place and kind."""
    generator = random.Random(SEED)
    places: dict[tuple[object, ...], list[WorkItem]] = {}
    for item in sorted(items, key=_get_place):
        start, end, operator, _ = _get_place(item)
        if "_BitOr_" not in operator:
            places.setdefault((start, end, operator.split("_")[0]), []).append(item)
    distinct = [generator.choice(place) for place in places.values()]
    return generator.sample(distinct, min(size, len(distinct)))


def _get_place(item: WorkItem) -> tuple[tuple[int, int], tuple[int, int], str, int]:
    (mutation,) = item.mutations
    return mutation.start_pos, mutation.end_pos, mutation.operator_name, mutation.occurrence


def build_report(scores: dict[str, Score]) -> list[dict[str, object]]:
    """Return the figures of each module, and of all together."""
    total = Score(sum(score.tested for score in scores.values()), [d for score in scores.values() for d in score.survivors])
    return [
        {
            "name": f"mutation score, {name}, {score.tested} mutants",
            "value": round(score.value, 3),
            "unit": "share",
            "peer": None,
            "ratio": None,
            "goal": GOAL,
            "met": score.value >= GOAL,
        }
        for name, score in [*scores.items(), ("all", total)]
    ]


if __name__ == "__main__":
    main()
