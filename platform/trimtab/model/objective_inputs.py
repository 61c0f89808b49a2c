"""One training step of a prefix: what the frozen model gives for a micro-batch, and the gradient of an objective on it.

The same for every objective and on any device, with no cluster in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from trimtab.model.frozen_model import FrozenModel, TokenizedSample, TrainingExample
from trimtab.objectives import Objective, Scores
from trimtab.types import LABELS


@dataclass(frozen=True)
class StepResult:
    """Sums over one micro-batch: `gradient` [k, d] of the weighted loss sum, for each class the sum of plain per-token losses
    and the number of rows, and what the objective observes [tracked]."""

    gradient: Tensor
    loss: float
    nll: dict[str, float]
    rows: dict[str, int]
    observed: Tensor


@dataclass(frozen=True)
class BatchTotals:
    """Of a whole batch, over all its micro-batches and workers: the sum of its rows' weights, and how many target tokens its
    plain benign rows have."""

    weight: float
    easy: int


@dataclass(frozen=True)
class BaseOutputs:
    """What the frozen model gives for a sample without the prefix: `logp` [T], `state` [d] before the answer, `odds`."""

    logp: Tensor
    state: Tensor
    odds: Tensor


@dataclass
class ObjectiveScorer:
    """Computes just what an objective needs. `refusing` and `helping` are the token ids that open refusals and help; `sharded`
    is whether other workers hold parts of the model, which must then be run as often by all."""

    frozen: FrozenModel
    objective: Objective
    refusing: Sequence[int] = ()
    helping: Sequence[int] = ()
    sharded: bool = False
    _plain: dict[TokenizedSample, BaseOutputs] = field(default_factory=dict[TokenizedSample, BaseOutputs])

    def compute(
        self,
        vectors: Tensor,
        batch: Sequence[TrainingExample],
        whole: BatchTotals,
        running: Tensor,
        anchor: Tensor | None = None,
    ) -> StepResult:
        """Loss and gradient of one micro-batch.

        `vectors` float32 [k, d]; with `whole` of the whole batch, gradients of its micro-batches add up to that of the batch.
        """
        leaf = vectors.detach().requires_grad_()
        scores = self.compute_scores(leaf, batch, running, anchor, whole)
        weights = torch.tensor([e.weight for e in batch], device=self.frozen.device)
        loss = (self.objective(scores) * weights).sum() / whole.weight
        (gradient,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            observed = self.objective.observe(scores).cpu()
        return StepResult(gradient.float().cpu(), loss.item(), *summarize_losses(scores, batch), observed)

    def compute_scores(
        self,
        vectors: Tensor | None,
        batch: Sequence[TrainingExample],
        running: Tensor,
        anchor: Tensor | None = None,
        whole: BatchTotals | None = None,
    ) -> Scores:
        """What the objective is given for a micro-batch, differentiable in `vectors`; without `whole` it is all there is."""
        needs = self.objective.needs
        chosen = [e.chosen for e in batch]
        rejected = [s for e in batch if (s := self._rejected(e))]
        samples = [*chosen, *rejected]
        states = self.frozen.target_states(vectors, [s.ids for s in samples], [s.targets for s in samples])
        parts = self.frozen.compute_logprobs(states, _wanted(samples)).split([s.targets for s in samples])
        logp, mask = _padded(parts[: len(batch)])
        first = _firsts(chosen)
        given: dict[str, Tensor] = {}
        if "reference" in needs:
            given["reference"] = _padded([self.get_base_outputs(s).logp for s in chosen])[0]
        if "rejected" in needs:
            given["rejected_logp"], given["rejected_mask"] = _padded(parts[len(batch) :])
            if "reference" in needs:
                given["rejected_reference"] = _padded([self.get_base_outputs(s).logp for s in rejected])[0]
        if "drift" in needs:
            given["drift"] = self._drift(states, batch, whole or compute_totals(batch))
        if "odds" in needs:
            given["odds"] = self._odds(states[first])
        if "states" in needs:
            given["states"] = states[first].float()
            given["base_states"] = torch.stack([self.get_base_outputs(s).state for s in chosen])
        if "anchor" in needs and anchor is not None:
            with torch.no_grad():
                then = self.frozen.target_states(anchor, [s.ids for s in chosen], [s.targets for s in chosen])
                given["anchor"] = _padded(
                    self.frozen.compute_logprobs(then, _wanted(chosen)).split([s.targets for s in chosen])
                )[0]
        harmful = torch.tensor([e.label == "harmful" for e in batch], device=self.frozen.device)
        return Scores(logp, mask, harmful, running=running.to(logp), **given)

    def count_tokens(self, example: TrainingExample) -> int:
        """Tokens of what a row is learned from: its prompt and answer, once more with the answer that is not wanted where the
        objective asks for it, and the prefix's rows."""
        rejected = self._rejected(example)
        return len(example.chosen.ids) + (len(rejected.ids) if rejected else 0)

    def precompute_base_outputs(self, examples: Sequence[TrainingExample]) -> None:
        """Compute now what later steps would ask of `plain`, so that workers that share the model do it together."""
        if "reference" in self.objective.needs or "states" in self.objective.needs:
            for example in examples:
                self.get_base_outputs(example.chosen)
                if rejected := self._rejected(example):
                    self.get_base_outputs(rejected)

    def get_base_outputs(self, sample: TokenizedSample) -> BaseOutputs:
        """The sample without the prefix; computed once, as neither the weights nor the sample ever change."""
        if sample not in self._plain:
            with torch.no_grad():
                states = self.frozen.target_states(None, [sample.plain], [sample.targets])
                logp = self.frozen.compute_logprobs(states, _wanted([sample]))
                self._plain[sample] = BaseOutputs(logp, states[0].float(), self._odds(states[:1])[0])
        return self._plain[sample]

    def _rejected(self, example: TrainingExample) -> TokenizedSample | None:
        """The row's answer that is not wanted, where the objective asks for it."""
        return example.rejected if "rejected" in self.objective.needs else None

    def _odds(self, states: Tensor) -> Tensor:
        """Log-odds [B] of refusal openers against help openers after states [B, d]."""
        if not self.refusing or not self.helping:
            return states.new_zeros(len(states), dtype=torch.float32)
        logits = self.frozen.head(states)
        return logits[:, list(self.refusing)].logsumexp(1) - logits[:, list(self.helping)].logsumexp(1)

    def _drift(self, states: Tensor, batch: Sequence[TrainingExample], whole: BatchTotals) -> Tensor:
        """KL(base || prefixed) [B] of plain benign rows, of which the weighted mean over the whole batch is the mean over their
        target tokens; zero for others."""
        drifts = states.new_zeros(len(batch), dtype=torch.float32)
        at = [i for i, e in enumerate(batch) if e.label == "benign_easy"]
        if not at and not self.sharded:
            return drifts
        chosen = [batch[i].chosen for i in at or [0]]
        with torch.no_grad():
            plain = self.frozen.target_logits(None, [s.plain for s in chosen], [s.targets for s in chosen])
            base = log_softmax(plain, -1)
        if not at:
            return drifts
        parts = states[: sum(e.chosen.targets for e in batch)].split([e.chosen.targets for e in batch])
        prefixed = log_softmax(self.frozen.head(torch.cat([parts[i] for i in at])), -1)
        sums = torch.stack([kl.sum() for kl in (base.exp() * (base - prefixed)).split([s.targets for s in chosen])])
        shares = [whole.weight / (batch[i].weight * whole.easy) for i in at]
        return drifts.index_put((torch.tensor(at, device=drifts.device),), sums * sums.new_tensor(shares))


def compute_totals(batch: Sequence[TrainingExample]) -> BatchTotals:
    """What the micro-batches of a batch are told of it."""
    return BatchTotals(sum(e.weight for e in batch), sum(e.chosen.targets for e in batch if e.label == "benign_easy"))


def collect_openers(examples: Sequence[TrainingExample]) -> tuple[list[int], list[int]]:
    """Token ids that open the refusals, and those that open the help and no refusal (ours)."""
    refusing = {e.chosen.ids[-e.chosen.targets] for e in examples if e.label == "harmful"}
    helping = {e.chosen.ids[-e.chosen.targets] for e in examples if e.label != "harmful"}
    return sorted(refusing), sorted(helping - refusing)


def summarize_losses(scores: Scores, batch: Sequence[TrainingExample]) -> tuple[dict[str, float], dict[str, int]]:
    """For each class, the sum of its rows' mean negative log-probabilities and their number."""
    nll = scores.nll.detach().tolist()
    sums = {label: sum(v for e, v in zip(batch, nll, strict=True) if e.label == label) for label in LABELS}
    counts = {label: sum(e.label == label for e in batch) for label in LABELS}
    return {k: v for k, v in sums.items() if counts[k]}, {k: v for k, v in counts.items() if v}


def _wanted(samples: Sequence[TokenizedSample]) -> list[int]:
    """All target tokens, one sample after the other."""
    return [t for s in samples for t in s.ids[-s.targets :]]


def _firsts(samples: Sequence[TokenizedSample]) -> list[int]:
    """Where each sample's first target token is among all target tokens."""
    at, firsts = 0, list[int]()
    for s in samples:
        firsts.append(at)
        at += s.targets
    return firsts


def _padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as [B, T] with zeros, and the mask of what is real."""
    longest = max(map(len, parts))
    rows = torch.stack([pad(part, (0, longest - len(part))) for part in parts])
    mask = torch.stack([pad(torch.ones_like(part), (0, longest - len(part))) for part in parts])
    return rows, mask.detach()
