"""Checkpoints and signal data sets on S3."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import boto3
import httpx
import pytest
import torch

from tests.support.align_runs import train_with_storage
from tests.support.factories import write_signal_dataset
from tests.support.object_store import list_keys
from trimtab.cli.console import console
from trimtab.cli.main import main
from trimtab.errors import ArtifactError
from trimtab.jobs.align.driver import TrainingResult
from trimtab.jobs.collect.signal_dataset import DatasetMetadata, begin_dataset, read_dataset
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.util.remote_paths import open_folder

BUCKET = "trimtab-tests"
BUCKET_URL = f"s3://{BUCKET}"
LAYERS = (0, 1)


def test_remote_signals_equal_local_signals(bucket, tiny_base, tmp_path, capsys):
    remote_folder, local_folder = open_folder(f"{bucket}/signals"), tmp_path / "signals"
    for folder in (remote_folder, local_folder):
        write_signal_dataset(folder, tiny_base, LAYERS)
    remote, local = read_dataset(remote_folder, tiny_base), read_dataset(local_folder, tiny_base)
    assert remote.digest == local.digest
    assert torch.equal(remote.psi, local.psi)
    assert len(begin_dataset(remote_folder, remote.meta)) == len(remote.keys)
    options = [
        "detect",
        "--signals",
        str(remote_folder),
        "--base",
        str(tiny_base.path),
        "--head",
        "linear",
        "--layers",
        "[1]",
        "--num_seeds",
        "1",
    ]
    assert main([*options, "--register", "false", "--out", str(tmp_path / "detector")]) == 0
    assert (tmp_path / "detector" / "card.json").exists()


@dataclass(frozen=True)
class StoredTraining:
    """Training of four steps with remote checkpoints, on a base model without prefix-tree batching, and its printed lines."""

    base: BaseModel
    folder: Path
    result: TrainingResult
    output: str

    def repeat(self, steps: int) -> TrainingResult:
        """Train again with the same checkpoints, up to a number of steps."""
        return train_with_storage(self.base, f"{BUCKET_URL}/checkpoints", self.folder, steps)


@pytest.fixture(scope="module")
def stored_training(bucket, tiny_base, tmp_path_factory) -> StoredTraining:
    folder = tmp_path_factory.mktemp("stored")
    shutil.copytree(tiny_base.path, folder / "conv")
    path = folder / "conv" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": ["full_attention", "conv"]}))
    base = resolve_base_model(str(folder / "conv"))
    with console.capture() as capture:
        result = train_with_storage(base, f"{bucket}/checkpoints", folder / "run", 4)
    return StoredTraining(base, folder / "run", result, capture.get())


def test_checkpoints_are_remote_only(stored_training):
    assert any(key.startswith("checkpoints/run/train/checkpoint_") for key in list_keys())
    assert not (stored_training.folder / "train").exists()


def test_training_resumes_from_remote_checkpoints(stored_training):
    assert torch.equal(stored_training.repeat(4).state.vectors, stored_training.result.state.vectors)
    assert stored_training.repeat(6).state.step == 6


def test_base_model_without_prefix_tree_batching_is_reported(stored_training):
    assert stored_training.output.count("prefix-tree batching is not available") == 1


@pytest.mark.parametrize(
    ("folder", "message"), [("s3://no-such-bucket/x", "is no data set of signals"), ("nowhere://x", "unsupported file system")]
)
def test_unreadable_signal_folder_is_one_error_line(bucket, tiny_base, folder, message, capsys):
    assert main(["detect", "--signals", folder, "--base", str(tiny_base.path)]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_bucket_is_not_created(bucket, tiny_base):
    meta = DatasetMetadata(tiny_base.name, tiny_base.fingerprint, LAYERS, tiny_base.width, "fp32", None, "")
    with pytest.raises(ArtifactError, match="cannot reach s3://no-such-bucket/x"):
        begin_dataset(open_folder("s3://no-such-bucket/x"), meta)
    assert [entry["Name"] for entry in boto3.client("s3").list_buckets()["Buckets"]] == [BUCKET]


def test_object_store_answers_over_http(bucket):
    assert httpx.get(os.environ["AWS_ENDPOINT_URL"]).status_code == 200
