"""Self-study: user prompts that the frozen model writes, about a system prompt and about other topics.

The templates are trimtab's; compare Eyuboglu et al. 2025, "Cartridges".
"""

import re
from collections.abc import Sequence

from trimtab.data.prompt import Prompt
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Sampling
from trimtab.jobs.distil.config import DistilConfig
from trimtab.jobs.runtime.engine_pool import GenerationRequest
from trimtab.jobs.runtime.generation_cache import generate_cached
from trimtab.model.base_model import BaseModel

QUESTION_TEMPLATES = (
    "Write one question that a user could ask you about your work. Reply with the question only.",
    "Write one short request that your instructions apply to. Reply with the request only.",
    "Pick one rule from your instructions, and write a user message for which it matters. Reply with the message only.",
    "Write one question whose answer is in your instructions. Reply with the question only.",
    "Write a message of a new user who does not know what you can do. Reply with the message only.",
    "Write one difficult question that a user of this service could ask. Reply with the question only.",
)
REQUEST_TEMPLATE = (
    "Write one short request about {topic} that somebody could send to an assistant. Reply with the request only."
)
TOPICS = (
    "cooking",
    "a train journey",
    "a letter to a neighbor",
    "school mathematics",
    "a broken bicycle",
    "learning a language",
    "a birthday party",
    "the weather",
    "a small garden",
    "a spreadsheet",
    "an old film",
    "sleep",
    "a job interview",
    "the history of a city",
    "a poem",
    "a computer program",
    "a pet",
    "saving money",
    "a museum",
    "the night sky",
)
TEMPERATURE, TOP_P, MAX_TOKENS = 1.0, 0.95, 48
# Samples per distinct prompt that is wanted: many are repetitions, or no single request.
OVERSAMPLING = 2
MIN_WORDS, MAX_WORDS = 3, 40
LABEL = re.compile(r"^\s*(?:[-*>#]+|\d+[.)]|(?:question|request|message|user)\s*:)\s*", re.IGNORECASE)


def write_prompts(config: DistilConfig, base: BaseModel, system: str, engine: EngineConfig) -> list[Prompt]:
    """Let the base model write user prompts, without repetitions.

    Args:
        config: settings of the job.
        base: base model.
        system: system prompt to ask about.
        engine: configuration of the engine.

    Returns:
        Questions about the system prompt and ordinary requests; fewer than the settings name if the model repeats itself.

    Raises:
        TrimtabError: if generation fails.
    """
    questions = [[{"role": "system", "content": system}, {"role": "user", "content": text}] for text in QUESTION_TEMPLATES]
    requests = [[{"role": "user", "content": REQUEST_TEMPLATE.format(topic=topic)}] for topic in TOPICS]
    counts = config.data.num_questions, config.data.num_requests
    kinds = (("self-study", questions, counts[0]), ("requests", requests, counts[1]))
    planned = {
        (source, index): GenerationRequest(messages, _build_sampling(count, len(conversations), config.data.seed + index))
        for source, conversations, count in kinds
        if count
        for index, messages in enumerate(conversations)
    }
    if not planned:
        return []
    answers = generate_cached("prompts by the model", base, list(planned.values()), engine, config.scale)
    prompts: list[Prompt] = []
    for source, _, count in kinds:
        texts = [
            [answer.text for answer in answers[request.key(engine.dtype)]]
            for (name, _), request in planned.items()
            if name == source
        ]
        # One text of each template in turn, so that a limit leaves all templates.
        listed = [text for group in zip(*texts, strict=False) for text in group]
        prompts += [Prompt(text, "benign_easy", source, text) for text in select_prompts(listed, count)]
    return prompts


def select_prompts(texts: Sequence[str], count: int) -> list[str]:
    """Return up to `count` distinct prompts from generated texts.

    A text may have a label, quotes, or further lines, of which the first is used.
    """
    selected: dict[str, str] = {}
    for text in texts:
        lines = [line for line in text.splitlines() if line.strip()]
        cleaned = LABEL.sub("", lines[0]).strip().strip("\"'“”").strip() if lines else ""
        if MIN_WORDS <= len(cleaned.split()) <= MAX_WORDS and len(selected) < count:
            selected.setdefault(re.sub(r"\W+", " ", cleaned).casefold().strip(), cleaned)
    return list(selected.values())


def _build_sampling(count: int, conversations: int, seed: int) -> Sampling:
    samples = -(-OVERSAMPLING * count // conversations)
    return Sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, top_p=TOP_P, n=samples, seed=seed, logprobs=0)
