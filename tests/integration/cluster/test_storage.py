"""Signal data sets on S3."""

import os

import boto3
import httpx
import pytest
import torch

from tests.support.factories import write_signal_dataset
from trimtab.cli.main import main
from trimtab.detection.signal_dataset import read_dataset
from trimtab.detection.signal_files import DatasetMetadata, begin_dataset
from trimtab.errors import ArtifactError
from trimtab.util.remote_paths import open_folder

BUCKET = "trimtab-tests"
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
