"""Tasks that run an engine, each in a process of its own. Only such a process imports vLLM: that takes half a minute."""

from collections.abc import Iterator, Sequence

from trimtab.engine.config import EngineConfig
from trimtab.engine.offline import Engine
from trimtab.generation_types import Progress, Sampling
from trimtab.jobs.evaluate.variants import ArmBatch, group_batches
from trimtab.model.base_model import BaseModel, resolve_on_node


def generate_answers(tell: Progress, base: BaseModel, batches: Sequence[ArmBatch], config: EngineConfig) -> Iterator[list[str]]:
    """One answer for each prompt of a batch, batch by batch, all from one engine."""
    total = sum(len(batch.prompts) for batch in batches)
    before = 0
    with Engine(resolve_on_node(base), config) as engine:
        for group in group_batches(batches):
            asks = [batch.arm.build_ask(prompt) for batch in group for prompt in batch.prompts]
            sampling = [Sampling(max_tokens=batch.max_tokens) for batch in group for _ in batch.prompts]
            said = iter(engine.chat_many(asks, sampling, lambda done, _, before=before: tell(before + done, total)))
            for batch in group:
                yield [next(said)[0].text for _ in batch.prompts]
            before += len(asks)
