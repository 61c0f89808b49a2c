"""Mutation score of ten core modules: the share of mutants that the tests without an engine detect.

python bench/mutation.py [--module NAME ...] [--quick] [--out FOLDER] [--json FILE]

Cosmic Ray generates the mutants. One mutant is selected from those of the same place and kind, such as the replacements of one
operator. At most 60 of the selected mutants per module are sampled with a fixed seed. The sample depends on the code of the
module only, so scores before and after a change of the tests are comparable. Mutants of `|` are excluded, because most are type
annotations. An interrupted run continues with the results in the output folder. Surviving mutants are printed as diffs.
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
from faults import PACKAGE_FOLDER, ROOT, copy_repository

SAMPLE_SIZE, QUICK_SAMPLE_SIZE, SEED, GOAL = 60, 3, 0, 0.85
# Copies of the repository, each of which tests one mutant at a time.
COPIES = 2
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Target:
    """Module to mutate.

    Attributes:
        module: path of the module, relative to the repository.
        tests: paths of the test files that run against each mutant.
    """

    module: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Result of a module.

    Attributes:
        tested: number of tested mutants.
        survivors: diffs of the surviving mutants.
    """

    tested: int
    survivors: list[str]

    @property
    def value(self) -> float:
        """Share of detected mutants."""
        return 1 - len(self.survivors) / self.tested


ENGINE_TESTS, MODEL_TESTS = "tests/unit/engine", "tests/unit/model"
TARGETS = {
    "token guard": Target("platform/trimtab/engine/prefixes/token_guard.py", (f"{ENGINE_TESTS}/test_token_guard.py",)),
    "prefix slots": Target("platform/trimtab/engine/prefixes/slots.py", (f"{ENGINE_TESTS}/test_prefix_slots.py",)),
    "chat template": Target(
        "platform/trimtab/model/chat_template.py",
        (
            f"{MODEL_TESTS}/test_chat.py",
            f"{MODEL_TESTS}/test_prefix_tree.py",
            "tests/integration/engine/test_model_families.py",
        ),
    ),
    "hard filter": Target(
        "platform/trimtab/data/hard_filter.py", ("tests/unit/data/test_hard_filter.py", "tests/unit/data/test_prompt.py")
    ),
    "promotion rules": Target(
        "platform/trimtab/evaluation/promotion_rules.py", ("tests/unit/evaluation/test_promotion_rules.py",)
    ),
    "signals": Target(
        "platform/trimtab/detection/signals.py",
        ("tests/unit/artifacts/test_signals.py", f"{ENGINE_TESTS}/test_signal_capture.py"),
    ),
    "calibration": Target("platform/trimtab/detection/calibration.py", ("tests/unit/detection/test_calibration.py",)),
    "response rewriter": Target(
        "platform/trimtab/engine/openai/response_rewriter.py", (f"{ENGINE_TESTS}/test_response_rewriter.py",)
    ),
    "authentication": Target("serve/middleware/authentication.py", ("tests/unit/serve/test_authentication.py",)),
    "checkpoints": Target("jobs/align/checkpoints.py", ("tests/unit/jobs/test_checkpoints.py",)),
}


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    size = QUICK_SAMPLE_SIZE if options.quick else SAMPLE_SIZE
    with tempfile.TemporaryDirectory(prefix="trimtab-mutation-") as folder:
        copies = Queue[Path]()
        for number in range(COPIES):
            copies.put(copy_repository(Path(folder) / str(number)))

        def measure_module(name: str) -> Score:
            copy = copies.get()
            try:
                return measure_score(name, TARGETS[name], copy, options.out, size)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(COPIES) as pool:
            scores = dict(zip(options.module, pool.map(measure_module, options.module), strict=True))
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
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLE_SIZE} mutants per module")
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".mutation", help="folder of the results, where a repeated command continues"
    )
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def measure_score(name: str, target: Target, copy: Path, out: Path, size: int) -> Score:
    """Run the tests of a module against a sample of its mutants.

    Args:
        name: name of the module in messages.
        target: module and tests.
        copy: copy of the repository to mutate.
        out: folder of the results.
        size: maximum number of mutants.

    Raises:
        SystemExit: if the tests fail without a mutant.
    """
    test_command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    environment = os.environ | {
        "PYTHONPATH": str(copy / PACKAGE_FOLDER),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    session, config = out / f"{name.replace(' ', '-')}-{size}.sqlite", out / f"{name.replace(' ', '-')}.toml"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "{target.module}"\ntimeout = {TIMEOUT_SECONDS}\nexcluded-modules = []\n'
        f'test-command = "{shlex.join([*test_command, *target.tests])}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )

    def run_command(*command: str) -> None:
        completed = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if completed.returncode:
            output = completed.stdout[-2000:] + completed.stderr[-2000:]
            raise SystemExit(f"mutation of {name} failed: {' '.join(command)}: {output}")

    run_command(sys.executable, "-m", "cosmic_ray.cli", "baseline", str(config))
    if not session.exists():
        run_command(sys.executable, "-m", "cosmic_ray.cli", "init", str(config), str(session))
        with use_db(session, WorkDB.Mode.open) as database:
            sample = sample_items(list(database.work_items), size)
            database.clear()
            database.add_work_items(sample)
    print(f"{name} ...", flush=True)
    run_command(sys.executable, "-m", "cosmic_ray.cli", "exec", str(config), str(session))
    with use_db(session, WorkDB.Mode.open) as database:
        results = [result for _, result in database.results]
    if any(result.test_outcome == TestOutcome.INCOMPETENT for result in results):
        raise SystemExit(f"mutation of {name} failed: some mutants could not be tested. Delete {session}")
    return Score(len(results), [result.diff or "" for result in results if result.test_outcome == TestOutcome.SURVIVED])


def sample_items(items: Sequence[WorkItem], size: int) -> list[WorkItem]:
    """Sample mutants with a fixed seed, at most one of each place and kind."""
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
    """Build the lines of each module and of all modules together."""
    survivors = [diff for score in scores.values() for diff in score.survivors]
    total = Score(sum(score.tested for score in scores.values()), survivors)
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
