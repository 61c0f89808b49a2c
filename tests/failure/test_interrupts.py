"""Studies that stop while their arms train, because an arm fails or because of Ctrl-C, and continue afterwards."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run

from tests.support.align_runs import slow_steps, wait_for_checkpoint
from tests.support.homes import fresh_home
from tests.support.studies import STEPS, build_study_config
from trimtab import settings
from trimtab.errors import UsageError
from trimtab.jobs.study.config import StudyConfig
from trimtab.jobs.study.job import compare_arms
from trimtab.tracking.client import get_client, get_experiment_id

ARMS = ("poft#0", "sta#0")


@dataclass(frozen=True)
class FailedStudy:
    """Study of two concurrent arms, of which the first one failed.

    Attributes:
        folder: folder of the prompts.
        config: settings of the same study with a valid arm in the place of the first one.
        error: error of the study.
        stopped: MLflow run of the second arm, as the failure left it.
        steps: steps of that run.
    """

    folder: Path
    config: dict[str, Any]
    error: UsageError
    stopped: Run
    steps: list[int]


@pytest.fixture(scope="module")
def failed_study(cluster, tiny_base, tracking_template, tmp_path_factory) -> Generator[FailedStudy]:
    folder = tmp_path_factory.mktemp("study")
    with fresh_home(folder, tracking_template):
        config = build_study_config(tiny_base, folder)
        failing = config | {"arms": {"fails": {"train.init": "token:"}, "sta": {}}}
        with slow_steps(), pytest.raises(UsageError) as raised:
            compare_arms(StudyConfig(**failing))
        stopped = get_client().get_run(read_run_id("sta#0"))
        yield FailedStudy(folder, config, raised.value, stopped, list_steps(stopped.info.run_id))


def get_arm_folder(arm: str) -> Path:
    return settings.get_runs_folder() / "study-tiny" / arm


def read_run_id(arm: str) -> str:
    return json.loads((get_arm_folder(arm) / "run.json").read_text())["run_id"]


def list_steps(run_id: str) -> list[int]:
    return [metric.step for metric in get_client().get_metric_history(run_id, "train/loss")]


def test_failed_arm_stops_the_others_with_a_checkpoint(failed_study):
    """The study raises the error of the failed arm; the other arm can be resumed."""
    assert "train.init 'token:' has no tokens" in str(failed_study.error)
    assert failed_study.stopped.info.status == "KILLED"
    assert 0 < len(failed_study.steps) < STEPS
    assert not any((get_arm_folder(arm) / "prefix").exists() for arm in ("fails#0", "sta#0"))


def test_interrupted_study_stops_all_arms_and_resumes(failed_study):
    """The failed study continues with another arm, is interrupted, and continues to its end."""
    path = failed_study.folder / "study.yaml"
    path.write_text(json.dumps(failed_study.config))
    command = [sys.executable, "-m", "trimtab", "study", "--config", str(path)]
    with slow_steps():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        for arm in ARMS:
            wait_for_checkpoint(get_arm_folder(arm), process)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Run the same command to resume" in output
    assert not any((get_arm_folder(arm) / "prefix").exists() for arm in ARMS), "both arms must have been training"
    run_ids = [read_run_id(arm) for arm in ARMS]
    assert run_ids[1] == failed_study.stopped.info.run_id
    report = compare_arms(StudyConfig(**failed_study.config))
    assert {arm.name for arm in report.parts["test"]} >= set(ARMS)
    for run_id in run_ids:
        assert sorted(list_steps(run_id)) == list(range(1, STEPS + 1)), "the curve must have no gap, and no step twice"
    (study_run,) = get_client().search_runs([get_experiment_id()], "attributes.run_name = 'study tiny'")
    children = get_client().search_runs([get_experiment_id()], f"tags.`mlflow.parentRunId` = '{study_run.info.run_id}'")
    assert {child.info.run_name for child in children} == {"fails seed 0", "poft seed 0", "sta seed 0"}
