"""Outputs of the frozen model without the prefix, which objectives compare with. They are constant, and cached."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.model.chunked_logprobs import TopLogprobs
from trimtab.model.frozen_model import FrozenModel, TokenizedSample

# Tokens that the distribution of a teacher lists [ours], and samples that share a pass of it.
TEACHER_TOKENS, TEACHER_ROWS = 64, 8


@dataclass(frozen=True)
class BaseOutputs:
    """Outputs of the frozen model for a sample without the prefix.

    Attributes:
        logp: log-probabilities of the target tokens [T].
        state: last hidden state before the answer [d].
        odds: log-odds of a refusal opener against a help opener.
    """

    logp: Tensor
    state: Tensor
    odds: Tensor


@dataclass
class ReferenceOutputs:
    """Outputs of the frozen model, alone and as a teacher with a system prompt.

    Attributes:
        frozen: frozen model.
        refusing: token ids that open refusals.
        helping: token ids that open helpful answers.
    """

    frozen: FrozenModel
    refusing: Sequence[int] = ()
    helping: Sequence[int] = ()
    _base_outputs: dict[TokenizedSample, BaseOutputs] = field(default_factory=dict[TokenizedSample, BaseOutputs])
    _teacher_outputs: dict[TokenizedSample, TopLogprobs] = field(default_factory=dict[TokenizedSample, TopLogprobs])

    def get_base_outputs(self, sample: TokenizedSample) -> BaseOutputs:
        """Return the base outputs of a sample; cached, because the model and the sample are constant."""
        if sample not in self._base_outputs:
            with torch.no_grad():
                states = self.frozen.target_states(None, [sample.plain], [sample.targets])
                logp = self.frozen.compute_logprobs(states, list_target_tokens([sample]))
                self._base_outputs[sample] = BaseOutputs(logp, states[0].float(), self.compute_odds(states[:1])[0])
        return self._base_outputs[sample]

    def get_teacher_outputs(self, samples: Sequence[TokenizedSample]) -> list[TopLogprobs]:
        """Return the next-token distributions of the teacher for each sample; cached like the base outputs.

        The system prompt of the teacher is computed once for all samples.
        """
        missing = [sample for sample in samples if sample not in self._teacher_outputs]
        if missing:
            sizes = [s.targets for s in missing]
            with torch.no_grad():
                states = self.frozen.target_states(None, [s.plain for s in missing], sizes)
            top = self.frozen.compute_top_logprobs(states, TEACHER_TOKENS)
            columns = zip(*(values.split(sizes) for values in (top.tokens, top.logprobs, top.rest)), strict=True)
            self._teacher_outputs |= {s: TopLogprobs(*values) for s, values in zip(missing, columns, strict=True)}
        return [self._teacher_outputs[sample] for sample in samples]

    def compute_odds(self, states: Tensor) -> Tensor:
        """Compute the log-odds [B] of refusal openers against help openers after states [B, d]."""
        if not self.refusing or not self.helping:
            return states.new_zeros(len(states), dtype=torch.float32)
        logits = self.frozen.head(states)
        return logits[:, list(self.refusing)].logsumexp(1) - logits[:, list(self.helping)].logsumexp(1)


def list_target_tokens(samples: Sequence[TokenizedSample]) -> list[int]:
    """Return all target tokens, one sample after the other."""
    return [t for s in samples for t in s.ids[-s.targets :]]
