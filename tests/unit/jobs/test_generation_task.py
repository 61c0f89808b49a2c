"""Limits of the generation task."""

from trimtab.engine.vllm_ext.capture_worker import KEEP
from trimtab.jobs.evaluate.generation_task import SCORED_TOGETHER


def test_prompts_are_scored_before_the_workers_discard_their_signals():
    assert SCORED_TOGETHER <= KEEP
