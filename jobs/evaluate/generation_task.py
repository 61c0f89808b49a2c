"""Generation task, which runs an engine in its own process.

Only this process imports vLLM, because the import takes half a minute.
"""

from collections.abc import Iterator, Sequence

from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.generation_types import Progress, Sampling
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
            if (detector := group[0].detector) is not None:
                conversations = [group[0].arm.build_conversation(prompt) for prompt in group[0].prompts]
                yield engine.score_prompts(
                    conversations, detector, lambda done, _, before=before: progress(before + done, total)
                )
                before += len(group[0].prompts)
                continue
            conversations = [batch.arm.build_conversation(prompt) for batch in group for prompt in batch.prompts]
            sampling = [Sampling(max_tokens=batch.max_tokens) for batch in group for _ in batch.prompts]
            choices = iter(
                engine.chat_many(
                    conversations, sampling, lambda done, _, before=before: progress(before + done, total), with_signals=False
                )
            )
            for batch in group:
                yield [next(choices)[0].text for _ in batch.prompts]
            before += len(conversations)
