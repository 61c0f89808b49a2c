"""MLflow assessments of traced requests, from the labels of their answers."""

import logging
from queue import Queue

from trimtab.detection.live_labels import LiveLabel
from trimtab.engine.metrics import UNRECORDED
from trimtab.serve.background_queue import BackgroundQueue
from trimtab.tracking.client import RequestTraces

log = logging.getLogger(__name__)

MOST_WAITING = 1000
STOP_SECONDS = 5.0


class AssessmentSink:
    """Background thread that adds labels to the MLflow traces of their requests.

    The journal of labels is written before, so that a label is not lost if MLflow cannot be reached.
    """

    def __init__(self) -> None:
        self._traces: RequestTraces | None = None
        self._queue: BackgroundQueue[LiveLabel] = BackgroundQueue(
            "assessments", MOST_WAITING, self._run, UNRECORDED, STOP_SECONDS
        )

    def __call__(self, label: LiveLabel) -> None:
        """Queue a label without blocking; drop and count it if the queue is full."""
        self._queue.put(label)

    def stop(self) -> None:
        """Write the queued labels; give up after STOP_SECONDS."""
        self._queue.stop()

    def _run(self, queue: Queue[LiveLabel | None]) -> None:
        while (label := queue.get()) is not None:
            try:
                # Not in the constructor: a replica must start during an outage of MLflow.
                self._traces = self._traces or RequestTraces()
                facts = {"choice": str(label.choice), "trusted": str(label.trusted).lower()}
                name, value = label.named_value
                self._traces.add_feedback(label.id, name, label.rater, facts, value=value)
            except Exception:
                UNRECORDED.inc()
                log.warning("assessment of request %s lost", label.id, exc_info=True)
