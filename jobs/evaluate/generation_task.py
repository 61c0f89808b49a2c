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
from trimtab.generation_types import Answer, Progress, Sampling
from trimtab.jobs.evaluate.variants import ArmBatch, group_batches
from trimtab.model.base_model import BaseModel, resolve_on_node


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
            asks = [batch.arm.build_ask(prompt) for batch in group for prompt in batch.prompts]
            sampling = [Sampling(max_tokens=batch.max_tokens) for batch in group for _ in batch.prompts]
            choices = iter(engine.chat_many(asks, sampling, lambda done, _, before=before: progress(before + done, total)))
            for batch in group:
                answers = [next(choices)[0] for _ in batch.prompts]
                if batch.detector is not None:
                    yield score_prompt_answers(batch.detector, answers, config.layers)
                else:
                    yield [answer.text for answer in answers]
            before += len(asks)


def score_prompt_answers(detector: Detector, answers: Sequence[Answer], layers: Sequence[int]) -> list[float]:
    """Compute the risks of prompts from the signals of answers of one token.

    Args:
        detector: detector of prompts.
        answers: answer of one token to each prompt.
        layers: layers that the engine captures.

    Raises:
        JobError: if the engine has no signals of an answer.
    """
    signals = [answer.signals for answer in answers if answer.signals is not None]
    if len(signals) < len(answers):
        raise JobError("the engine has no signals of a prompt. Run the command again")
    indices = [layers.index(layer) for layer in detector.card.layers]
    psi = convert_to_prompt_states(torch.stack([entry.psi[indices] for entry in signals]))
    return detector.score_prompts(psi).tolist()
