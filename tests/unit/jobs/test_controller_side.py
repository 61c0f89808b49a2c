"""MLflow callback of the Ray Train controller: reports, failures, and errors that end a run."""

import pytest
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from trimtab.errors import DivergedError, JobError, TrackingError, UsageError
from trimtab.jobs.align.controller_side import MlflowCallback
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.tracking import runs
from trimtab.tracking.client import get_client


@pytest.fixture
def callback(home):
    return MlflowCallback(runs.start_run("t", "align", home / "outbox"))


def read_tags(callback):
    return get_client().get_run(callback.run.run_id).data.tags


def test_report_is_logged_with_its_history(callback):
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    reported = [{"step": 2, "history": history, "node": {"system/node_0/x": 1.0}}, {"node": {"system/node_1/x": 2.0}}]
    callback.after_report(None, reported, None)
    run_id = callback.run.run_id
    assert [m.value for m in get_client().get_metric_history(run_id, "train/loss")] == [3.0, 2.0]
    assert [(m.step, m.value) for m in get_client().get_metric_history(run_id, "system/node_1/x")] == [(2, 2.0)]
    assert "trimtab.prefix_tree" not in read_tags(callback)


def test_missing_prefix_tree_is_a_tag(callback):
    callback.after_report(None, [{"step": 1, "prefix_tree": False}], None)
    assert read_tags(callback)["trimtab.prefix_tree"] == "unavailable"


@pytest.mark.parametrize("error", [UsageError("train.init has no tokens"), DivergedError("the loss is not finite")])
def test_error_that_a_restart_cannot_change_ends_the_run(callback, error):
    failures = {0: RuntimeError("collective operation failed"), 1: error}
    with pytest.raises(type(error), match=str(error)):
        callback.after_exception(None, failures)
    assert read_tags(callback)["trimtab.last_failure"] == "workers [0, 1]"


@pytest.mark.parametrize("error", [TrackingError("away"), JobError("cannot read the checkpoints"), RuntimeError("killed")])
def test_other_errors_leave_the_restart_to_ray_train(callback, error):
    callback.after_exception(None, {0: error})
    assert read_tags(callback)["trimtab.last_failure"] == "workers [0]"


def test_error_of_a_worker_is_found_in_errors_of_ray_train():
    error = UsageError("train.init has no tokens")
    assert unwrap_ray_error(ControllerError(error)) is error
    assert unwrap_ray_error(WorkerGroupError("failed", {1: error})) is error
