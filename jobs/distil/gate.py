"""Gate of a distilled prefix: the share of the system prompt's effect that it must have."""

from trimtab.evaluation.gate import GateDecision
from trimtab.evaluation.rules.rule_results import compute_recovered_share
from trimtab.jobs.distil.config import DistilGateConfig
from trimtab.jobs.distil.evaluation import DistilResults
from trimtab.types import BASE_ARM


def check_gate(gate: DistilGateConfig, results: DistilResults, name: str, *, is_first: bool) -> GateDecision:
    """Decide whether a prefix passes the gate.

    Args:
        gate: settings of the gate.
        results: evaluation of the prefix.
        name: name of the prefix.
        is_first: whether there is no champion, so that the point estimate decides.
    """
    share = compute_recovered_share(results.rules, name)
    if share is not None:
        decisive = share.value if is_first else share.low
        text = f"{share} of the system prompt's gain on its rules, minimum {gate.min_recovered:.2f}"
        return GateDecision(decisive >= gate.min_recovered, text)
    before, after = results.divergence[BASE_ARM], results.divergence[name]
    reduction = 1 - after.value / before.value if before.value > 0 else 0.0
    text = (
        f"no rule shows an effect of the system prompt; divergence from it {before.value:.3f} -> {after.value:.3f} nats per "
        f"token, reduced by {reduction:.2f}, minimum {gate.min_divergence_reduction:.2f}"
    )
    return GateDecision(reduction >= gate.min_divergence_reduction, text)
