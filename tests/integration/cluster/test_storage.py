"""Checkpoints and signals on S3, by a server of its own."""

import os
import threading
import time
from collections.abc import Generator
from pathlib import Path

import boto3
import httpx
import pytest
import torch

from tests.support.align_runs import prepared
from tests.support.factories import signal_set
from trimtab.cli.main import main
from trimtab.errors import ArtifactError
from trimtab.jobs.align.config import AlignConfig, TrainConfig
from trimtab.jobs.align.driver import TrainingResult, run_training
from trimtab.jobs.collect.signal_dataset import DatasetMetadata, begin_dataset, read_dataset
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.tracking import runs
from trimtab.util.remote_paths import open_folder

BUCKET = "trimtab-tests"
AWAY_SECONDS = 3
LAYERS = (0, 1)


@pytest.fixture(scope="module")
def bucket(cluster, object_store) -> Generator[str]:
    """Bucket that this process and Ray's workers reach."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"


def keys() -> list[str]:
    return [each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def test_signals_are_the_same_there_as_here(bucket, small, tmp_path, capsys):
    there, here = open_folder(f"{bucket}/signals"), tmp_path / "signals"
    for folder in (there, here):
        signal_set(folder, small, LAYERS)
    first, second = read_dataset(there, small), read_dataset(here, small)
    assert first.digest == second.digest
    assert torch.equal(first.psi, second.psi)
    assert len(begin_dataset(there, first.meta)) == len(first.keys)
    given = [
        "detect",
        "--signals",
        str(there),
        "--base",
        str(small.path),
        "--head",
        "linear",
        "--layers",
        "[1]",
        "--num_seeds",
        "1",
    ]
    assert main([*given, "--register", "false", "--out", str(tmp_path / "detector")]) == 0
    assert (tmp_path / "detector" / "card.json").exists()


def fit(base, storage: str, folder: Path, steps: int, every: int = 2) -> TrainingResult:
    train = TrainConfig(
        max_steps=steps, global_batch_size=4, micro_batch_size=2, checkpoint_every=every, max_target_tokens=8, dtype="fp32"
    )
    config = AlignConfig(name="stored", train=train, scale=ScaleConfig(cpus_per_worker=1, storage_path=storage))
    folder.mkdir(exist_ok=True)
    return run_training(config, base, prepared(), runs.start_run("stored", "align", folder / "outbox"), folder)


def test_checkpoints_go_there_and_training_goes_on_from_them(bucket, small, tmp_path):
    first = fit(small, f"{bucket}/checkpoints", tmp_path, 4)
    assert any(key.startswith(f"checkpoints/{tmp_path.name}/train/checkpoint_") for key in keys())
    assert not (tmp_path / "train").exists()
    assert torch.equal(fit(small, f"{bucket}/checkpoints", tmp_path, 4).state.vectors, first.state.vectors)
    assert fit(small, f"{bucket}/checkpoints", tmp_path, 6).state.step == 6


def test_storage_that_is_away_for_a_time_costs_nothing_but_time(object_store, bucket, small, tmp_path):
    wanted = fit(small, str(tmp_path / "here"), tmp_path / "undisturbed", 24, every=4)
    stopped: list[int] = []

    def stop() -> None:
        while not any("checkpoint_" in key and "disturbed" in key for key in keys()):
            time.sleep(0.02)
        object_store.stop()
        stopped.append(1)
        time.sleep(AWAY_SECONDS)
        object_store.start()

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    found = fit(small, f"{bucket}/away", tmp_path / "disturbed", 24, every=4)
    thread.join(30)
    assert stopped
    assert torch.equal(found.state.vectors, wanted.state.vectors)


@pytest.mark.parametrize(
    ("where", "said"), [("s3://no-such-bucket/x", "is no data set of signals"), ("nowhere://x", "unsupported file system")]
)
def test_places_that_hold_nothing_are_one_line(bucket, small, where, said, capsys):
    assert main(["detect", "--signals", where, "--base", str(small.path)]) in (1, 2)
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_a_bucket_that_is_not_there_is_not_made(bucket, small):
    meta = DatasetMetadata(small.name, small.fingerprint, LAYERS, small.width, "fp32", None, "")
    with pytest.raises(ArtifactError, match="cannot reach s3://no-such-bucket/x"):
        begin_dataset(open_folder("s3://no-such-bucket/x"), meta)
    assert [each["Name"] for each in boto3.client("s3").list_buckets()["Buckets"]] == [BUCKET]


def test_the_server_is_a_real_one(bucket):
    assert httpx.get(os.environ["AWS_ENDPOINT_URL"]).status_code == 200
