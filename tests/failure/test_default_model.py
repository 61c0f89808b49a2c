"""Training on the default model, whose steps are too slow for the integration tests."""

from tests.support.align_runs import read_loss_curve, train


def test_loss_falls_on_the_default_model(cluster, base, tmp_path):
    _, run_id = train(base, tmp_path, workers=1, max_steps=12, validate_every=6)
    losses = read_loss_curve(run_id)
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] < losses[1]
