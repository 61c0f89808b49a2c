"""Generation task, which runs an engine in its own process.

Only this process imports vLLM, because the import takes half a minute.
"""

from collections.abc import Iterator, Sequence

import torch

from trimtab.detection.detector import Detector
from trimtab.detection.signals import convert_to_prompt_states
from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.errors import JobError
from trimtab.generation_types import Progress, Sampling
from trimtab.jobs.evaluate.variants import ArmBatch, group_batches
from trimtab.model.base_model import BaseModel, resolve_on_node

# Prompts per engine call, fewer than the requests whose signals the workers keep.
SCORED_TOGETHER = 512


def generate_answers(
    progress: Progress, base: BaseModel, batches: Sequence[ArmBatch], config: EngineConfig
) -> Iterator[list[str] | list[float]]:
    """Generate one answer per prompt, or compute its risk, with one engine for all batches.

    Args:
        progress: progress callback.
        base: base model.
        batches: prompts by arm.
        config: configuration of the engine.

    Yields:
        Answers of each batch, or risks of its prompts, in order.
    """
    total = sum(len(batch.prompts) for batch in batches)
    before = 0
    with Engine(resolve_on_node(base), config) as engine:
        for group in group_batches(batches):
            if (detector := group[0].detector) is not None:
                yield score_prompts(engine, detector, group[0], lambda done, _, before=before: progress(before + done, total))
                before += len(group[0].prompts)
                continue
            asks = [batch.arm.build_ask(prompt) for batch in group for prompt in batch.prompts]
            sampling = [Sampling(max_tokens=batch.max_tokens) for batch in group for _ in batch.prompts]
            choices = iter(
                engine.chat_many(
                    asks, sampling, lambda done, _, before=before: progress(before + done, total), with_signals=False
                )
            )
            for batch in group:
                yield [next(choices)[0].text for _ in batch.prompts]
            before += len(asks)


def score_prompts(engine: Engine, detector: Detector, batch: ArmBatch, progress: Progress) -> list[float]:
    """Compute the risks of prompts.

    Args:
        engine: engine that captures the layers of the detector.
        detector: detector of prompts.
        batch: prompts, and the arm under which they are read.
        progress: called with the numbers of finished and of all prompts.

    Raises:
        JobError: if the engine has no signals of a prompt.
    """
    indices = [engine.config.layers.index(layer) for layer in detector.card.layers]
    risks: list[float] = []
    for start in range(0, len(batch.prompts), SCORED_TOGETHER):
        asks = [batch.arm.build_ask(prompt) for prompt in batch.prompts[start : start + SCORED_TOGETHER]]
        recorded = detector.card.windows
        answers = [answer for (answer,) in engine.chat_many(asks, Sampling(max_tokens=1), recorded=recorded)]
        signals = [answer.signals for answer in answers if answer.signals is not None]
        if len(signals) < len(answers):
            raise JobError("the engine has no signals of a prompt. Run the command again")
        psi = convert_to_prompt_states(torch.stack([entry.psi[indices] for entry in signals]))
        windows = [entry.windows[:, indices] if len(entry.windows) else None for entry in signals]
        risks += detector.score_prompts(psi, windows).tolist()
        progress(len(risks), len(batch.prompts))
    return risks
