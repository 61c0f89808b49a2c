"""What is asked of the model about a question, beyond its answer: more answers, drawn, and whether its own is true.

It runs beside the engine, so that of the samples only what is kept travels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import ArtifactError
from trimtab.generation_types import Answer, Sampling
from trimtab.jobs.collect.signal_dataset import SampledAnswer
from trimtab.jobs.runtime.engine_pool import BATCH, AskEngine, GenerationRequest
from trimtab.scores import p_true

# Answers that an engine is asked for at once: a few rounds of what it runs at the same time. It remembers the signals of 1,024
# at most, and what a stop loses is one batch.
AT_ONCE = 256
# As many of the likeliest tokens as vLLM names; the two letters are among them where the model means to reply at all.
LIKELIEST = 20
HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class GatheredAnswers:
    """A question's greedy `answer`, the `samples` drawn beside it, and the model's `verdict`, one token with the likeliest
    ones; None where it was not asked for."""

    answer: Answer
    samples: tuple[SampledAnswer, ...] = ()
    verdict: Answer | None = None


@dataclass(frozen=True)
class AnswerSampler:
    """Answers requests greedily, with so many `samples` each at a `temperature`, and asks for verdicts where `p_true`."""

    samples: int
    temperature: float
    p_true: bool

    @property
    def batch(self) -> int:
        """Questions that an engine is given at once."""
        return min(BATCH, max(1, AT_ONCE // (1 + self.samples)))

    def __call__(self, ask: AskEngine, requests: Sequence[GenerationRequest]) -> list[GatheredAnswers]:
        """One for each request, in order. Raises errors of ours."""
        answers = [several[0] for several in ask(requests)]
        nothing: list[list[Answer]] = [[]] * len(requests)
        drawn = ask([self._drawing(request) for request in requests]) if self.samples else nothing
        asking = [read_verdict(request, answer) for request, answer in zip(requests, answers, strict=True)]
        verdicts = ask(asking) if self.p_true else nothing
        return [
            GatheredAnswers(answer, tuple(map(build_sample, several)), one[0] if one else None)
            for answer, several, one in zip(answers, drawn, verdicts, strict=True)
        ]

    def _drawing(self, request: GenerationRequest) -> GenerationRequest:
        # A seed of the question's own: the same for a question each time, and no two questions share their luck.
        seed = int(request.key("auto")[:8], 16)
        sampling = Sampling(request.sampling.max_tokens, self.temperature, n=self.samples, seed=seed)
        return GenerationRequest(request.messages, sampling)


def read_verdict(request: GenerationRequest, answer: Answer) -> GenerationRequest:
    """The question whether an answer is true."""
    asked = p_true.build_p_true_question(request.messages[-1]["content"], answer.text)
    return GenerationRequest([{"role": "user", "content": asked}], Sampling(max_tokens=1, logprobs=LIKELIEST))


def build_sample(answer: Answer) -> SampledAnswer:
    """What is kept of a sample. Raises ArtifactError where the engine lost its signals."""
    if answer.signals is None:
        raise ArtifactError(f"the engine gave no signals for the sample {answer.text[:60]!r}")
    logp = answer.signals.history[:, 0].mean().item()
    return SampledAnswer(answer.text, len(answer.token_ids), logp, _ends(answer.signals.psi))


def _ends(psi: Tensor) -> Tensor:
    """Last states [L, d] of psi [L, 3d] as float16: no score feels its rounding, and a state too large for it is cut to fit."""
    # A copy: a view would take all of psi along.
    return psi[:, : psi.shape[1] // 3].clamp(-HALF, HALF).to(torch.float16, copy=True)
