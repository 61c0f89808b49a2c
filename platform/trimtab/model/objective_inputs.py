"""Training step of a prefix: inputs of an objective from the frozen model, and the gradient of its loss.

The code is the same for every objective and device and does not depend on Ray.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from trimtab.model.chunked_logprobs import TopLogprobs
from trimtab.model.frozen_model import FrozenModel, TokenizedSample, TrainingExample
from trimtab.model.reference_outputs import TEACHER_ROWS, ReferenceOutputs, list_target_tokens
from trimtab.objectives import Need, Objective, Scores
from trimtab.types import LABELS


@dataclass(frozen=True)
class StepResult:
    """Sums over one micro-batch.

    Attributes:
        gradient: gradient of the weighted loss sum [k, d].
        loss: weighted loss sum.
        losses: sum of the mean per-token losses of the rows, by class.
        rows: number of rows, by class.
        observed: sums that the objective observes [tracked].
    """

    gradient: Tensor
    loss: float
    losses: dict[str, float]
    rows: dict[str, int]
    observed: Tensor


@dataclass(frozen=True)
class BatchTotals:
    """Totals of a whole batch, over all micro-batches and workers.

    Attributes:
        weight: sum of the row weights.
        easy: number of target tokens of the plain benign rows (`benign_easy`).
    """

    weight: float
    easy: int


@dataclass(frozen=True)
class ForwardPass:
    """Forward pass of a micro-batch with the prefix.

    Attributes:
        batch: examples of the micro-batch.
        chosen: target of each example.
        rejected: rejected answers of the examples, if the objective needs them.
        states: hidden states before each token of the targets, then of the rejected answers [tokens, d].
        logprobs: log-probabilities of the tokens of each target, then of each rejected answer.
        anchor: anchor vectors [k, d], or None before the switch.
        whole: totals of the whole batch.
    """

    batch: Sequence[TrainingExample]
    chosen: Sequence[TokenizedSample]
    rejected: Sequence[TokenizedSample]
    states: Tensor
    logprobs: Sequence[Tensor]
    anchor: Tensor | None
    whole: BatchTotals


@dataclass
class ObjectiveScorer:
    """Computes exactly the inputs that an objective needs.

    Attributes:
        references: frozen model, and its outputs without the prefix.
        objective: objective to evaluate.
        sharded: whether the model is sharded over workers, which must then all run the same number of passes.
    """

    references: ReferenceOutputs
    objective: Objective
    sharded: bool = False

    @property
    def frozen(self) -> FrozenModel:
        """Frozen model."""
        return self.references.frozen

    def compute(
        self,
        vectors: Tensor,
        batch: Sequence[TrainingExample],
        whole: BatchTotals,
        running: Tensor,
        anchor: Tensor | None = None,
    ) -> StepResult:
        """Compute loss and gradient of one micro-batch.

        Gradients of the micro-batches add up to the gradient of the batch.

        Args:
            vectors: vectors of the prefix, float32 [k, d].
            batch: examples of the micro-batch.
            whole: totals of the whole batch.
            running: values that the objective has tracked so far [tracked].
            anchor: anchor vectors [k, d], or None before the switch.
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
        """Compute the inputs of the objective for a micro-batch, differentiable with respect to `vectors`.

        Args:
            vectors: vectors of the prefix [k, d], or None for the base model.
            batch: examples of the micro-batch.
            running: values that the objective has tracked so far [tracked].
            anchor: anchor vectors [k, d], or None before the switch.
            whole: totals of the whole batch; None if the micro-batch is the whole batch.
        """
        forward = self._run_forward(vectors, batch, anchor, whole or compute_totals(batch))
        inputs: dict[str, Tensor] = {}
        for need, provide in PROVIDERS.items():
            if need in self.objective.needs:
                inputs |= provide(self, forward)
        logp, mask = _pad(forward.logprobs[: len(batch)])
        harmful = torch.tensor([e.label == "harmful" for e in batch], device=self.frozen.device)
        return Scores(logp, mask, harmful, running=running.to(logp), **inputs)

    def _run_forward(
        self, vectors: Tensor | None, batch: Sequence[TrainingExample], anchor: Tensor | None, whole: BatchTotals
    ) -> ForwardPass:
        """Run the frozen model with the prefix on the targets and, if the objective needs them, on the rejected answers."""
        chosen = [e.chosen for e in batch]
        rejected = [s for e in batch if (s := self._get_rejected(e))]
        samples = [*chosen, *rejected]
        sizes = [s.targets for s in samples]
        states = self.frozen.target_states(vectors, [s.ids for s in samples], sizes)
        tokens = list_target_tokens(samples)
        reads_targets = self.objective.reads_targets
        values = self.frozen.compute_logprobs(states, tokens) if reads_targets else states.new_zeros(len(tokens))
        logprobs = values.float().split(sizes)
        return ForwardPass(batch, chosen, rejected, states, logprobs, anchor, whole)

    def count_tokens(self, example: TrainingExample) -> int:
        """Count the tokens that training on an example processes.

        The count covers prompt, slot tokens and answer, and again with the rejected answer if the objective needs it.
        """
        rejected = self._get_rejected(example)
        return len(example.chosen.ids) + (len(rejected.ids) if rejected else 0)

    def precompute_base_outputs(self, examples: Sequence[TrainingExample]) -> None:
        """Compute and cache the base outputs that later steps need.

        Workers that share a sharded model must compute them together.
        """
        if "reference" in self.objective.needs or "states" in self.objective.needs:
            for example in examples:
                self.references.get_base_outputs(example.chosen)
                if rejected := self._get_rejected(example):
                    self.references.get_base_outputs(rejected)
        if "teacher" in self.objective.needs:
            samples = [example.chosen for example in examples]
            for start in range(0, len(samples), TEACHER_ROWS):
                self.references.get_teacher_outputs(samples[start : start + TEACHER_ROWS])

    def _get_rejected(self, example: TrainingExample) -> TokenizedSample | None:
        """Return the rejected answer of an example if the objective needs it."""
        return example.rejected if "rejected" in self.objective.needs else None


def compute_totals(batch: Sequence[TrainingExample]) -> BatchTotals:
    """Compute the totals of a batch, which its micro-batches need."""
    return BatchTotals(sum(e.weight for e in batch), sum(e.chosen.targets for e in batch if e.label == "benign_easy"))


def collect_openers(examples: Sequence[TrainingExample]) -> tuple[list[int], list[int]]:
    """Collect the first answer tokens of refusals and of helpful answers.

    A token that opens answers of both sides belongs to the side where its share is larger.

    Args:
        examples: training examples.

    Returns:
        Token ids that open refusals, and token ids that open helpful answers.
    """
    firsts = [(e.chosen.ids[-e.chosen.targets], e.label == "harmful") for e in examples]
    refusing, helping = (Counter(token for token, harmful in firsts if harmful == side) for side in (True, False))
    refusals, helps = max(1, refusing.total()), max(1, helping.total())
    refuses = {token: refusing[token] / refusals >= helping[token] / helps for token, _ in firsts}
    return sorted(token for token in refuses if refuses[token]), sorted(token for token in refuses if not refuses[token])


def summarize_losses(scores: Scores, batch: Sequence[TrainingExample]) -> tuple[dict[str, float], dict[str, int]]:
    """Sum the losses of a micro-batch by class.

    Args:
        scores: scores of the micro-batch.
        batch: examples of the micro-batch.

    Returns:
        Sum of the mean losses per token of the rows by class, and number of rows by class.
    """
    losses = scores.row_loss.detach().tolist()
    sums = {label: sum(v for e, v in zip(batch, losses, strict=True) if e.label == label) for label in LABELS}
    counts = {label: sum(e.label == label for e in batch) for label in LABELS}
    return {k: v for k, v in sums.items() if counts[k]}, {k: v for k, v in counts.items() if v}


def _first_target_indices(samples: Sequence[TokenizedSample]) -> list[int]:
    """Return the index of each sample's first target token among all target tokens."""
    offset, firsts = 0, list[int]()
    for s in samples:
        firsts.append(offset)
        offset += s.targets
    return firsts


def _pad(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad sequences of different lengths with zeros to [B, T], and return the mask of the real entries."""
    longest = max(map(len, parts))
    rows = torch.stack([pad(part, (0, longest - len(part))) for part in parts])
    mask = torch.stack([pad(torch.ones_like(part), (0, longest - len(part))) for part in parts])
    return rows, mask.detach()


def _provide_reference(scorer: ObjectiveScorer, forward: ForwardPass) -> dict[str, Tensor]:
    return {"reference": _pad([scorer.references.get_base_outputs(s).logp for s in forward.chosen])[0]}


def _provide_rejected(scorer: ObjectiveScorer, forward: ForwardPass) -> dict[str, Tensor]:
    logp, mask = _pad(forward.logprobs[len(forward.batch) :])
    inputs = {"rejected_logp": logp, "rejected_mask": mask}
    if "reference" in scorer.objective.needs:
        inputs["rejected_reference"] = _pad([scorer.references.get_base_outputs(s).logp for s in forward.rejected])[0]
    return inputs


def _provide_drift(scorer: ObjectiveScorer, forward: ForwardPass) -> dict[str, Tensor]:
    """Compute KL(base || prefixed) [B] of plain benign rows; zero for other rows.

    The values are scaled so that their weighted mean over the whole batch is the mean over the target tokens of these rows.
    """
    batch, whole = forward.batch, forward.whole
    drifts = forward.states.new_zeros(len(batch), dtype=torch.float32)
    easy = [i for i, e in enumerate(batch) if e.label == "benign_easy"]
    if not easy and not scorer.sharded:
        return {"drift": drifts}
    chosen = [batch[i].chosen for i in easy or [0]]
    with torch.no_grad():
        logits = scorer.frozen.target_logits(None, [s.plain for s in chosen], [s.targets for s in chosen])
        base = log_softmax(logits, -1)
    if not easy:
        return {"drift": drifts}
    sizes = [s.targets for s in forward.chosen]
    parts = forward.states[: sum(sizes)].split(sizes)
    prefixed = log_softmax(scorer.frozen.head(torch.cat([parts[i] for i in easy])), -1)
    sums = torch.stack([kl.sum() for kl in (base.exp() * (base - prefixed)).split([s.targets for s in chosen])])
    shares = [whole.weight / (batch[i].weight * whole.easy) for i in easy]
    return {"drift": drifts.index_put((torch.tensor(easy, device=drifts.device),), sums * sums.new_tensor(shares))}


def _provide_odds(scorer: ObjectiveScorer, forward: ForwardPass) -> dict[str, Tensor]:
    return {"odds": scorer.references.compute_odds(forward.states[_first_target_indices(forward.chosen)])}


def _provide_states(scorer: ObjectiveScorer, forward: ForwardPass) -> dict[str, Tensor]:
    states = forward.states[_first_target_indices(forward.chosen)].float()
    return {"states": states, "base_states": torch.stack([scorer.references.get_base_outputs(s).state for s in forward.chosen])}


def _provide_anchor(scorer: ObjectiveScorer, forward: ForwardPass) -> dict[str, Tensor]:
    if forward.anchor is None:
        return {}
    sizes = [s.targets for s in forward.chosen]
    with torch.no_grad():
        states = scorer.frozen.target_states(forward.anchor, [s.ids for s in forward.chosen], sizes)
        logprobs = scorer.frozen.compute_logprobs(states, list_target_tokens(forward.chosen)).split(sizes)
    return {"anchor": _pad(logprobs)[0]}


def _provide_teacher(scorer: ObjectiveScorer, forward: ForwardPass) -> dict[str, Tensor]:
    """Compute the divergence from the teacher [B, T] of each target token."""
    sizes = [s.targets for s in forward.chosen]
    outputs = scorer.references.get_teacher_outputs(forward.chosen)
    columns = ([getattr(o, name) for o in outputs] for name in ("tokens", "logprobs", "rest"))
    teacher = TopLogprobs(*map(torch.cat, columns))
    divergences = scorer.frozen.compute_divergences(forward.states[: sum(sizes)], teacher)
    return {"divergence": _pad(divergences.split(sizes))[0]}


# Inputs of `Scores` by the need of an objective. The order is fixed: workers that share a model must run the same passes.
PROVIDERS: dict[Need, Callable[[ObjectiveScorer, ForwardPass], dict[str, Tensor]]] = {
    "reference": _provide_reference,
    "rejected": _provide_rejected,
    "drift": _provide_drift,
    "odds": _provide_odds,
    "states": _provide_states,
    "anchor": _provide_anchor,
    "teacher": _provide_teacher,
}
