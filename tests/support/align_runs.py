"""Short training runs: data set, options, training in the test process, checkpoints and loss curves."""

import os
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.support.prompt_rows import BENIGN, HARMFUL, REFUSAL
from trimtab.data.hard_filter import FilterResult, TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.jobs.align.config import AlignConfig, TrainConfig
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.align.driver import TrainingResult, run_training
from trimtab.jobs.align.worker import TrainingLoop, TrainingWork, build_loop
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.model.base_model import BaseModel
from trimtab.tracking import runs
from trimtab.tracking.client import get_client

# Steps of a training run in the test process.
SHORT_STEPS = 32

STEPS, WAIT_SECONDS = 80, 300
OPTIONS = (
    f"--train.max_steps {STEPS} --train.global_batch_size 6 --train.micro_batch_size 2 --train.checkpoint_every 10 "
    "--train.early_stopping_patience 0 --train.dtype fp32 --evaluate.limit 2 --evaluate.max_tokens 4 --scale.cpus_per_worker 1"
)


def build_dataset() -> PreparedDataset:
    """Build a data set of harmful and benign rows, without evaluation prompts."""
    rows = [TrainingRow(Prompt(text, "harmful", "t", text), REFUSAL, 11) for text in HARMFUL]
    labels = ("benign_hard", "benign_easy")
    rows += [
        TrainingRow(Prompt(text, labels[i % 2], "t", text), f"Of course. Here is what to know: {text}", 12)
        for i, text in enumerate(BENIGN)
    ]
    return PreparedDataset(
        rows, rows[1:6], {"train": [], "validation": [], "test": []}, FilterResult(rows, [], []), (0.5, 0.5), []
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    """Wait until a job with its runs in a folder has written its first checkpoint."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(folder.glob("**/train/checkpoint_*/state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no checkpoint in {folder}"
        time.sleep(0.02)


@contextmanager
def slow_steps() -> Generator[None]:
    """Slow down the steps of all training runs inside the context, so that a test can stop them between two steps."""
    path = Path(os.environ["TRIMTAB_TEST_SLOW_STEPS"])
    path.touch()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def train_locally(base: BaseModel) -> torch.Tensor:
    """Train in this process with the settings of `build_config`, without Ray; return the vectors."""
    loop = build_local_loop(base)
    loop.report = lambda *_: None
    state = loop.create_state()
    loop.run(state)
    return state.vectors


def build_local_loop(base: BaseModel, **train) -> TrainingLoop:
    """Build the training loop of one worker with the settings of `build_config`, without a control actor."""
    dataset = build_dataset()
    work = TrainingWork(build_config(workers=1, **train), base, dataset.train, dataset.validation, None, None)
    loop = build_loop(work, torch.device("cpu"), rank=0, workers=1)
    loop.push_progress = lambda _: None
    return loop


def build_config(workers: int, parallelism: str = "data", storage_path: str | None = None, **train) -> AlignConfig:
    """Settings of a short run, with a drift term, so that micro-batches differ in cost."""
    options = {"max_steps": SHORT_STEPS, "global_batch_size": 4, "micro_batch_size": 2, "validate_every": 10}
    options |= {"checkpoint_every": 4, "max_target_tokens": 8, "dtype": "fp32", "early_stopping_patience": 0}
    scale = ScaleConfig(num_workers=workers, cpus_per_worker=1, parallelism=parallelism, storage_path=storage_path)
    return AlignConfig(name="t", objective_options={"beta": 0.05}, train=TrainConfig(**(options | train)), scale=scale)


def train(base: BaseModel, folder: Path, workers: int, **settings) -> tuple[torch.Tensor, str]:
    """Train in the test process; return the vectors and the id of the MLflow run."""
    folder.mkdir(exist_ok=True)
    run = runs.start_run("t", "align", folder / "outbox")
    result = run_training(build_config(workers, **settings), base, build_dataset(), run, folder)
    assert result.state.step == settings.get("max_steps", SHORT_STEPS)
    return result.state.vectors, run.run_id


def train_with_storage(base: BaseModel, storage: str, folder: Path, steps: int, every: int = 2) -> TrainingResult:
    """Train with checkpoints in a storage folder."""
    settings = TrainConfig(
        max_steps=steps, global_batch_size=4, micro_batch_size=2, checkpoint_every=every, max_target_tokens=8, dtype="fp32"
    )
    config = AlignConfig(name="stored", train=settings, scale=ScaleConfig(cpus_per_worker=1, storage_path=storage))
    folder.mkdir(exist_ok=True)
    return run_training(config, base, build_dataset(), runs.start_run("stored", "align", folder / "outbox"), folder)


def read_loss_curve(run_id: str) -> dict[int, float]:
    """Return the training loss of a run by step."""
    return {metric.step: metric.value for metric in get_client().get_metric_history(run_id, "train/loss")}
