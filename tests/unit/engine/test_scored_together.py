"""Limits of the in-process engine."""

from trimtab.engine.offline import SCORED_TOGETHER
from trimtab.engine.vllm_ext.capture_worker import KEEP


def test_prompts_are_scored_before_the_workers_discard_their_signals():
    assert SCORED_TOGETHER <= KEEP
