"""Commands that are interrupted with Ctrl-C while they train."""

import json
import os
import signal
import subprocess
import sys

from tests.support.align_runs import slow_steps, wait_for_checkpoint
from tests.support.studies import STEPS, build_study_config
from trimtab import settings
from trimtab.jobs.study.config import StudyConfig
from trimtab.jobs.study.job import compare_arms
from trimtab.tracking.client import get_client

ARMS = ("poft#0", "sta#0")


def test_interrupted_study_stops_all_arms_and_resumes(home, cluster, tiny_base, tmp_path):
    config = build_study_config(tiny_base, tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "trimtab", "study", "--config", str(path)]
    folders = [settings.get_runs_folder() / "study-tiny" / arm for arm in ARMS]
    with slow_steps():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        for folder in folders:
            wait_for_checkpoint(folder, process)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Run the same command to resume" in output
    assert not any((folder / "prefix").exists() for folder in folders), "both arms must have been training"
    run_ids = [json.loads((folder / "run.json").read_text())["run_id"] for folder in folders]
    report = compare_arms(StudyConfig(**config))
    assert {arm.name for arm in report.parts["test"]} >= set(ARMS)
    for run_id in run_ids:
        steps = [metric.step for metric in get_client().get_metric_history(run_id, "train/loss")]
        assert sorted(steps) == list(range(1, STEPS + 1)), "the curve must have no gap, and no step twice"
