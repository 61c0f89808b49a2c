"""What tests of learning share: a few rows, the options of a short job, and its first checkpoint."""

import subprocess
import time
from pathlib import Path

from tests.support.prompt_rows import BENIGN, HARMFUL, REFUSAL
from trimtab.data.hard_filter import FilterResult, TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.jobs.align.dataset import PreparedDataset

STEPS, WAIT_SECONDS = 80, 300
OPTIONS = (
    f"--train.max_steps {STEPS} --train.global_batch_size 6 --train.micro_batch_size 2 --train.checkpoint_every 10 "
    "--train.early_stopping_patience 0 --train.dtype fp32 --evaluate.limit 2 --evaluate.max_tokens 4 --scale.cpus_per_worker 1"
)


def prepared() -> PreparedDataset:
    rows = [TrainingRow(Prompt(t, "harmful", "t", t), REFUSAL, 11) for t in HARMFUL]
    labels = ("benign_hard", "benign_easy")
    rows += [
        TrainingRow(Prompt(t, labels[i % 2], "t", t), f"Of course. Here is what to know: {t}", 12) for i, t in enumerate(BENIGN)
    ]
    return PreparedDataset(
        rows, rows[1:6], {"train": [], "validation": [], "test": []}, FilterResult(rows, [], []), (0.5, 0.5), []
    )


def first_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    """Wait until a job whose run, or whose runs, are in this folder has one."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(folder.glob("**/train/checkpoint_*/state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
