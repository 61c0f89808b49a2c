"""Detector heads: FLaG's equations by hand, the parameters of its stage II, and learning on synthetic data."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from trimtab import heads
from trimtab.errors import NotFoundError, UsageError
from trimtab.heads import DetectorRows, compute_auroc, predict_scores
from trimtab.heads.flag import Flag, compute_pairwise_loss, settle_groups

WIDTH, LAYERS = 8, 2
HEADS = ("flag", "linear", "saplma", "mlp", "sep", "haloscope")


def make_rows(count: int, seed: int, labeled: float = 1.0) -> DetectorRows:
    """Make answers whose label shows, with noise, in one direction of the last state of the last layer.

    `labeled` is the fraction of answers with a label.
    """
    generator = torch.Generator().manual_seed(seed)
    truthful = (torch.rand(count, generator=generator) < 0.75).float()
    psi = 0.5 * torch.randn(count, LAYERS, 3 * WIDTH, generator=generator)
    psi[:, -1, 0] += 3 * truthful
    spread = 1 - truthful + 0.1 * torch.randn(count, generator=generator)
    hidden = torch.rand(count, generator=generator) >= labeled
    return DetectorRows(psi, torch.randn(count, 7, generator=generator), truthful.masked_fill(hidden, math.nan), spread)


def test_flag_by_hand():
    """r = (1, 0), with prototypes along both axes: pi is the softmax of (1/tau, 0), and s is the log of the pi-weighted sum of
    exponentiated scores."""
    head = Flag(1, 1, groups=2, projection=2, hidden=2, tau=0.5).eval()
    with torch.no_grad():
        head.project.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
        head.mlp = torch.nn.Identity()
        head.mlp.forward = lambda x: x[:, :2]
        head.prototypes.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.2]]))
        head.score.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        head.score.bias.copy_(torch.tensor([0.5, -1.0]))
    psi, phi = torch.tensor([[[1.0, 5.0, 7.0]]]), torch.zeros(1, 7)
    shares = [math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)]
    expected = math.log(shares[0] * math.exp(2.5) + shares[1] * math.exp(-1.0))
    assert head(psi, phi).item() == pytest.approx(expected, abs=1e-5)
    head.aggregate = "mean"
    assert head(psi, phi).item() == pytest.approx(shares[0] * 2.5 - shares[1], abs=1e-5)


def test_flag_is_the_log_odds_of_a_mixture():
    """sum_g pi_g e^{s_g} = e^s, so that s is the log-odds of a mixture: the identity behind the paper's theorem."""
    head = Flag(WIDTH, LAYERS, groups=5).eval()
    data = make_rows(20, 0)
    log_pi, by_group = head.parts(data.psi, data.phi)
    torch.testing.assert_close(log_pi.exp().sum(1), torch.ones(20))
    torch.testing.assert_close((log_pi.exp() * by_group.exp()).sum(1), head(data.psi, data.phi).exp())
    # pi is a softmax over cosines, so that the group with the largest share has the nearest prototype.
    r = head.mlp(torch.cat([head.project(data.psi.flatten(1)), data.phi], 1))
    nearest = torch.stack([cosine_similarity(r, c[None]) for c in head.prototypes], 1).argmax(1)
    assert torch.equal(log_pi.argmax(1), nearest)


def test_pairwise_loss_by_hand():
    loss = compute_pairwise_loss(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2)
    assert compute_pairwise_loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == 0


def test_ablations_ignore_removed_input():
    data = make_rows(4, 0)
    torch.manual_seed(0)
    no_trace, no_geometry = Flag(WIDTH, LAYERS, trace=False).eval(), Flag(WIDTH, LAYERS, geometry=False).eval()
    assert torch.equal(no_trace(data.psi, data.phi), no_trace(data.psi, data.phi + 1))
    assert not torch.equal(no_trace(data.psi, data.phi), no_trace(data.psi + 1, data.phi))
    assert torch.equal(no_geometry(data.psi, data.phi), no_geometry(data.psi + 1, data.phi))


def test_parameter_count_equals_paper():
    head = Flag(4096, 1, groups=64, projection=0)
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(59e6, rel=0.01)


def test_stage_two_changes_only_group_scores():
    torch.manual_seed(0)
    head, data = Flag(WIDTH, LAYERS, groups=4), make_rows(120, 1, labeled=0.5)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    settle_groups(head, data, make_rows(100, 2), seed=0)
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"score.weight", "score.bias"}
    assert all(p.grad is None for name, p in head.named_parameters() if not name.startswith("score"))


def test_stage_two_does_not_lower_validation_auroc():
    torch.manual_seed(0)
    head, data, validation = Flag(WIDTH, LAYERS, groups=4), make_rows(400, 1, labeled=0.5), make_rows(200, 2)
    heads.run_gradient_descent(head, data.labelled, validation, 0)
    before = compute_auroc(predict_scores(head, validation), validation.truthful)
    settle_groups(head, data, validation, seed=0)
    assert compute_auroc(predict_scores(head, validation), validation.truthful) >= before


@pytest.mark.parametrize("name", HEADS)
def test_head_learns_and_is_deterministic(name):
    def fit_and_predict(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        head = heads.get_head(name)(WIDTH, LAYERS)
        head.fit(make_rows(400, 1), make_rows(100, 2), seed)
        return predict_scores(head, test)

    test = make_rows(300, 3)
    assert compute_auroc(fit_and_predict(0), test.truthful) > 0.9
    assert torch.equal(fit_and_predict(0), fit_and_predict(0))


def test_linear_head_reads_the_parts_that_it_is_built_for():
    train, validation, test = (make_rows(count, seed) for count, seed in ((400, 1), (100, 2), (300, 3)))
    for rows in (train, validation, test):
        # The label shows in the second part only.
        rows.psi[:, -1, WIDTH] = rows.psi[:, -1, 0]
        rows.psi[:, -1, 0] = 0
    aurocs = []
    for parts in (1, 2):
        head = heads.get_head("linear")(WIDTH, LAYERS, parts=parts)
        head.fit(train, validation, 0)
        aurocs.append(compute_auroc(predict_scores(head, test), test.truthful))
    assert aurocs[0] < 0.6
    assert aurocs[1] > 0.9


def test_flag_learns_from_partly_labeled_rows():
    torch.manual_seed(0)
    head, test = Flag(WIDTH, LAYERS, groups=4), make_rows(300, 3)
    head.fit(make_rows(400, 1, labeled=0.3), make_rows(100, 2), 0)
    assert compute_auroc(predict_scores(head, test), test.truthful) > 0.9


def test_auroc_counts_ties_as_half():
    assert compute_auroc(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(3.5 / 4)


def test_rejects_data_without_classes_or_samples():
    data = make_rows(20, 0)
    one_class = DetectorRows(data.psi, data.phi, torch.ones(20))
    with pytest.raises(UsageError, match="all of one class"):
        heads.get_head("linear")(WIDTH, LAYERS).fit(one_class, data, 0)
    with pytest.raises(UsageError, match="--num_samples"):
        heads.get_head("sep")(WIDTH, LAYERS).fit(DetectorRows(data.psi, data.phi, data.truthful), data, 0)
    with pytest.raises(NotFoundError, match="no head 'x'; there are: flag"):
        heads.get_head("x")
