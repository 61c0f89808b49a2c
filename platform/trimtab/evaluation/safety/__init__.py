"""Evaluation of refusal and compliance: results, comparison of arms, report."""
