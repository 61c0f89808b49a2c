"""FLaG: Fine-Grained Latent Grouping (arXiv 2606.00301, KDD 2026)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from trimtab.heads import BestWeights, DetectorRows, Head, TrainingSchedule, compute_auroc, register, run_gradient_descent

# Stage II: unlabeled rows per group, share of them at each end that forms pseudo pairs, and weight of the pseudo pairs.
NEAREST, ENDS, WEIGHT = 32, 0.2, 0.05


@register("flag")
class Flag(Head):
    """Soft assignment of answers to groups by prototypes, with one score function per group [paper].

    r = MLP([Linear(psi) ; phi]); pi = softmax_g(cos(r, c_g) / tau); s_g = w_g . r + b_g; s = logsumexp_g(log pi_g + s_g).
    Stage I minimizes softplus(-(s+ - s-)) over all pairs of a batch. Stage II runs if there are unlabeled rows: see
    `settle_groups`.

    Args:
        width: width d of the base model; psi has 3d values for each layer.
        layers: number of layers in psi.
        groups: number of groups K; 64 in the paper, fewer for small data sets [trimtab].
        projection: output width of the projection of psi; 0 for d as in the paper, 256 keeps the head small [trimtab].
        hidden: width of the hidden layer of the MLP.
        tau: temperature of the group assignment.
        dropout: dropout rate after the MLP's first layer [trimtab].
        geometry: whether the head reads psi; False is an ablation.
        trace: whether the head reads phi; False is an ablation.
        aggregate: `logsumexp`, or `mean` for sum_g pi_g s_g, an ablation.
    """

    schedule = TrainingSchedule()

    def __init__(
        self,
        width: int,
        layers: int,
        groups: int = 8,
        projection: int = 256,
        hidden: int = 1024,
        tau: float = 0.1,
        dropout: float = 0.1,
        geometry: bool = True,
        trace: bool = True,
        aggregate: Literal["logsumexp", "mean"] = "logsumexp",
    ) -> None:
        super().__init__()
        self.inputs, self.tau, self.aggregate = (geometry, trace), tau, aggregate
        self.reads_trace = trace
        size = projection or width
        self.project = nn.Linear(3 * width * layers, size)
        self.mlp = nn.Sequential(nn.Linear(size + 7, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, size))
        self.prototypes = nn.Parameter(torch.empty(groups, size))
        self.score = nn.Linear(size, groups)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.prototypes)

    def embedded(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute r [N, dim] from psi [N, L, 3d] and phi [N, 7]."""
        geometry, trace = self.inputs
        projected = self.project(psi.flatten(1)) * geometry
        return self.mlp(torch.cat([projected, phi * trace], 1))

    def parts(self, psi: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log pi [N, K] and s_g [N, K] from psi [N, L, 3d] and phi [N, 7]."""
        r = self.embedded(psi, phi)
        return self.grouped(r), self.score(r)

    def grouped(self, r: Tensor) -> Tensor:
        """Compute log pi [N, K] from r [N, dim]."""
        similarity = normalize(r, dim=-1) @ normalize(self.prototypes, dim=-1).T
        return (similarity / self.tau).log_softmax(-1)

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the scores [N] from psi [N, L, 3d] and phi [N, 7]."""
        return self.joined(*self.parts(psi, phi))

    def joined(self, log_pi: Tensor, by_group: Tensor) -> Tensor:
        """Compute the scores [N] from log pi [N, K] and s_g [N, K]."""
        if self.aggregate == "mean":
            return (log_pi.exp() * by_group).sum(-1)
        return (log_pi + by_group).logsumexp(-1)

    def loss(self, psi: Tensor, phi: Tensor, truthful: Tensor) -> Tensor:
        """Compute the pairwise logistic loss over all (truthful, made-up) pairs of the batch; 0 if there are none."""
        return compute_pairwise_loss(self(psi, phi), truthful)

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Train stage I on the labeled rows, then stage II with the unlabeled rows if there are any."""
        run_gradient_descent(self, train.labelled, validation, seed)
        if len(train.unlabelled):
            settle_groups(self, train, validation, seed)


def compute_pairwise_loss(score: Tensor, truthful: Tensor) -> Tensor:
    """Compute the mean of softplus(-(s+ - s-)) over all (truthful, made-up) pairs; 0 if there are none.

    Args:
        score: scores [N].
        truthful: labels [N], 1 for a right answer and 0 for a made-up one.
    """
    gaps = score[truthful == 1][:, None] - score[truthful == 0][None]
    return softplus(-gaps).mean() if gaps.numel() else score.sum() * 0


def settle_groups(head: Flag, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
    """Train stage II [paper]: only {w_g, b_g} are updated, on labeled pairs and, with lower weight, on pseudo pairs.

    Of the unlabeled rows nearest to each group, those with the group's highest and lowest scores become pseudo pairs. Pseudo
    pairs are compared by the score of their own group, and the epoch that is best on validation is kept, including the final
    weights of stage I [trimtab].

    Args:
        head: head after stage I.
        train: training rows, some of them unlabeled.
        validation: validation rows.
        seed: seed of the shuffling.
    """
    labeled, schedule = train.labelled, head.schedule
    head.eval()
    with torch.no_grad():
        # All parameters before {w_g, b_g} are fixed in stage II.
        r, r_labeled, r_validation = (head.embedded(rows.psi, rows.phi) for rows in (train.unlabelled, labeled, validation))
        log_pi, log_pi_labeled, log_pi_validation = map(head.grouped, (r, r_labeled, r_validation))
        pseudo = [_select_pseudo_pairs(log_pi[:, g], by_group) for g, by_group in enumerate(head.score(r).T)]
    optimizer = torch.optim.AdamW(head.score.parameters(), lr=schedule.learning_rate, weight_decay=schedule.decay)
    generator = torch.Generator().manual_seed(seed)

    def compute_validation_auroc() -> float:
        with torch.no_grad():
            return compute_auroc(head.joined(log_pi_validation, head.score(r_validation)), validation.truthful)

    best = BestWeights(head.score, compute_validation_auroc())
    for _ in range(schedule.epochs):
        for chosen in torch.randperm(len(labeled), generator=generator).split(schedule.batch):
            pseudo_losses = [
                compute_pairwise_loss(head.score(r[indices])[:, g], label) for g, (indices, label) in enumerate(pseudo)
            ]
            labeled_loss = compute_pairwise_loss(
                head.joined(log_pi_labeled[chosen], head.score(r_labeled[chosen])), labeled.truthful[chosen]
            )
            optimizer.zero_grad()
            (labeled_loss + WEIGHT * torch.stack(pseudo_losses).mean()).backward()
            optimizer.step()
        best.update(compute_validation_auroc())
    best.restore()


def _select_pseudo_pairs(log_pi: Tensor, by_group: Tensor) -> tuple[Tensor, Tensor]:
    """Select the rows nearest to a group with its highest and lowest scores, and return their indices and pseudo labels."""
    near = log_pi.topk(min(NEAREST, len(log_pi))).indices
    order = near[by_group[near].argsort(descending=True)]
    count = max(1, int(len(order) * ENDS))
    indices = torch.cat([order[:count], order[-count:]])
    return indices, torch.cat([torch.ones(count), torch.zeros(count)])
