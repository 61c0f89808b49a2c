"""Sampler of a question's greedy answer, additional samples, and p(True) verdict.

It runs in the engine's process, so that only the retained part of each sample is transferred.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.detection.signal_dataset import SampledAnswer
from trimtab.errors import ArtifactError
from trimtab.generation_types import Answer, Sampling
from trimtab.jobs.runtime.engine_pool import BATCH, GenerationRequest, SendToEngine
from trimtab.scores import p_true

# Answers requested from an engine per batch: a few rounds of its concurrent requests. The engine buffers the signals of at most
# 1,024 answers, and an interruption loses one batch.
AT_ONCE = 256
# The maximum number of log-probabilities that vLLM returns; it includes both letters if the model replies at all.
LIKELIEST = 20
HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class GatheredAnswers:
    """Model outputs for one question.

    Attributes:
        answer: greedy answer.
        samples: additional sampled answers.
        verdict: the model's p(True) verdict, one token with the likeliest tokens; None if it was not requested.
    """

    answer: Answer
    samples: tuple[SampledAnswer, ...] = ()
    verdict: Answer | None = None


@dataclass(frozen=True)
class AnswerSampler:
    """Engine work that generates greedy answers, samples, and p(True) verdicts.

    Attributes:
        samples: sampled answers per request.
        temperature: sampling temperature of the samples.
        p_true: whether to request verdicts.
    """

    samples: int
    temperature: float
    p_true: bool

    @property
    def batch(self) -> int:
        """Number of questions per engine batch."""
        return min(BATCH, max(1, AT_ONCE // (1 + self.samples)))

    def __call__(self, send: SendToEngine, requests: Sequence[GenerationRequest]) -> list[GatheredAnswers]:
        """Generate the outputs of each request, in order.

        Raises:
            TrimtabError: if the engine rejects a request or loses the signals of a sample.
        """
        answers = [choices[0] for choices in send(requests)]
        nothing: list[list[Answer]] = [[]] * len(requests)
        drawn = send([self._sample_request(request) for request in requests]) if self.samples else nothing
        verdict_requests = [build_verdict_request(request, answer) for request, answer in zip(requests, answers, strict=True)]
        verdicts = send(verdict_requests) if self.p_true else nothing
        return [
            GatheredAnswers(answer, tuple(map(build_sample, samples)), verdict[0] if verdict else None)
            for answer, samples, verdict in zip(answers, drawn, verdicts, strict=True)
        ]

    def _sample_request(self, request: GenerationRequest) -> GenerationRequest:
        # The seed derives from the question: reruns reproduce the samples, and no two questions share a seed.
        seed = int(request.key("auto")[:8], 16)
        sampling = Sampling(request.sampling.max_tokens, self.temperature, n=self.samples, seed=seed)
        return GenerationRequest(request.messages, sampling)


def build_verdict_request(request: GenerationRequest, answer: Answer) -> GenerationRequest:
    """Return the request that asks the model if `answer` is true."""
    question = p_true.build_p_true_question(request.messages[-1]["content"], answer.text)
    return GenerationRequest([{"role": "user", "content": question}], Sampling(max_tokens=1, logprobs=LIKELIEST))


def build_sample(answer: Answer) -> SampledAnswer:
    """Return the retained part of a sample.

    Raises:
        ArtifactError: if the engine returned no signals for the sample.
    """
    if answer.signals is None:
        raise ArtifactError(f"the engine returned no signals for the sample {answer.text[:60]!r}")
    logp = answer.signals.history[:, 0].mean().item()
    return SampledAnswer(answer.text, len(answer.token_ids), logp, _last_states(answer.signals.psi))


def _last_states(psi: Tensor) -> Tensor:
    """Return the last states [L, d] of psi [L, 3d] as float16, clamped to its range; no score depends on the rounding."""
    # Copy, because a view would keep all of psi in memory.
    return psi[:, : psi.shape[1] // 3].clamp(-HALF, HALF).to(torch.float16, copy=True)
