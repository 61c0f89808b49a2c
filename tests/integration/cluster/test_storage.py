"""Checkpoints and signals on S3, by a server of its own."""

import os

import boto3
import httpx
import pytest
import torch

from tests.support.align_runs import train_stored
from tests.support.factories import signal_set
from tests.support.object_store import list_keys
from trimtab.cli.main import main
from trimtab.errors import ArtifactError
from trimtab.jobs.collect.signal_dataset import DatasetMetadata, begin_dataset, read_dataset
from trimtab.util.remote_paths import open_folder

BUCKET = "trimtab-tests"
LAYERS = (0, 1)


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


def test_checkpoints_go_there_and_training_goes_on_from_them(bucket, small, tmp_path):
    first = train_stored(small, f"{bucket}/checkpoints", tmp_path, 4)
    assert any(key.startswith(f"checkpoints/{tmp_path.name}/train/checkpoint_") for key in list_keys())
    assert not (tmp_path / "train").exists()
    assert torch.equal(train_stored(small, f"{bucket}/checkpoints", tmp_path, 4).state.vectors, first.state.vectors)
    assert train_stored(small, f"{bucket}/checkpoints", tmp_path, 6).state.step == 6


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
