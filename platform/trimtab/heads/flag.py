"""FLaG: Fine-Grained Latent Grouping (arXiv 2606.00301, KDD 2026)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from trimtab.heads import BestWeights, DetectorRows, Head, TrainingSchedule, compute_auroc, register, run_gradient_descent

# Stage II: unlabelled rows taken for each group, the share of them at each end that make pairs, and the weight of these.
NEAREST, ENDS, WEIGHT = 32, 0.2, 0.05


@register("flag")
class Flag(Head):
    """Prototypes part the answers softly into groups, and each group has its own score [paper].

    r = MLP([Linear(psi) ; phi]); pi = softmax_g(cos(r, c_g) / tau); s_g = w_g . r + b_g; s = logsumexp_g(log pi_g + s_g).
    Stage I: softplus(-(s+ - s-)) over all pairs of a batch. Stage II, where there are unlabelled rows: see `settle`.

    Args:
        width: d of the base model; psi has 3d numbers for each layer.
        layers: number of layers in psi.
        groups: K; 64 in the paper, fewer where there are few rows (ours).
        projection: numbers that psi is brought down to, 0 for d as in the paper; 256 keeps the head small (ours).
        hidden: width of the MLP between.
        tau: temperature of the groups.
        dropout: after the MLP's first layer (ours).
        geometry, trace: whether psi and phi are seen, for ablations.
        aggregate: `logsumexp`, or `mean`: sum_g pi_g s_g, an ablation.
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
        self.seen, self.tau, self.aggregate = (geometry, trace), tau, aggregate
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
        """r [N, dim]."""
        geometry, trace = self.seen
        projected = self.project(psi.flatten(1)) * geometry
        return self.mlp(torch.cat([projected, phi * trace], 1))

    def parts(self, psi: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """log pi [N, K] and s_g [N, K]."""
        r = self.embedded(psi, phi)
        return self.grouped(r), self.score(r)

    def grouped(self, r: Tensor) -> Tensor:
        """log pi [N, K] of rows r [N, dim]."""
        alike = normalize(r, dim=-1) @ normalize(self.prototypes, dim=-1).T
        return (alike / self.tau).log_softmax(-1)

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Score [N]."""
        return self.joined(*self.parts(psi, phi))

    def joined(self, log_pi: Tensor, by_group: Tensor) -> Tensor:
        """Score [N] from log pi [N, K] and s_g [N, K]."""
        if self.aggregate == "mean":
            return (log_pi.exp() * by_group).sum(-1)
        return (log_pi + by_group).logsumexp(-1)

    def loss(self, psi: Tensor, phi: Tensor, truthful: Tensor) -> Tensor:
        """Pairwise logistic loss over all (truthful, made-up) pairs of the batch; 0 where it has none."""
        return compute_pairwise_loss(self(psi, phi), truthful)

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Stage I on the labelled rows, stage II with the unlabelled ones where there are any."""
        run_gradient_descent(self, train.labelled, validation, seed)
        if len(train.unlabelled):
            settle_groups(self, train, validation, seed)


def compute_pairwise_loss(score: Tensor, truthful: Tensor) -> Tensor:
    """Mean softplus(-(s+ - s-)) over the pairs of N scored answers."""
    gaps = score[truthful == 1][:, None] - score[truthful == 0][None]
    return softplus(-gaps).mean() if gaps.numel() else score.sum() * 0


def settle_groups(head: Flag, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
    """Stage II [paper]: of the unlabelled rows nearest to each group, those that it scores highest and lowest become pseudo
    pairs, and only {w_g, b_g} go on learning, from labelled pairs and, with less weight, from these. Pseudo pairs are compared
    by their own group's score, and the epoch that is best on validation is kept, stage I's last word included (ours)."""
    known, plan = train.labelled, head.schedule
    head.eval()
    with torch.no_grad():
        # Nothing before {w_g, b_g} changes any more.
        r, r_known, r_validation = (head.embedded(rows.psi, rows.phi) for rows in (train.unlabelled, known, validation))
        log_pi, log_pi_known, log_pi_validation = map(head.grouped, (r, r_known, r_validation))
        pseudo = [_ends(log_pi[:, g], by_group) for g, by_group in enumerate(head.score(r).T)]
    optimiser = torch.optim.AdamW(head.score.parameters(), lr=plan.learning_rate, weight_decay=plan.decay)
    generator = torch.Generator().manual_seed(seed)

    def reached() -> float:
        with torch.no_grad():
            return compute_auroc(head.joined(log_pi_validation, head.score(r_validation)), validation.truthful)

    best = BestWeights(head.score, reached())
    for _ in range(plan.epochs):
        for chosen in torch.randperm(len(known), generator=generator).split(plan.batch):
            extra = [compute_pairwise_loss(head.score(r[at])[:, g], label) for g, (at, label) in enumerate(pseudo)]
            labelled = compute_pairwise_loss(
                head.joined(log_pi_known[chosen], head.score(r_known[chosen])), known.truthful[chosen]
            )
            optimiser.zero_grad()
            (labelled + WEIGHT * torch.stack(extra).mean()).backward()
            optimiser.step()
        best.update(reached())
    best.restore()


def _ends(log_pi: Tensor, by_group: Tensor) -> tuple[Tensor, Tensor]:
    """Rows nearest to a group that it scores highest and lowest, and their pseudo labels."""
    near = log_pi.topk(min(NEAREST, len(log_pi))).indices
    order = near[by_group[near].argsort(descending=True)]
    count = max(1, int(len(order) * ENDS))
    at = torch.cat([order[:count], order[-count:]])
    return at, torch.cat([torch.ones(count), torch.zeros(count)])
