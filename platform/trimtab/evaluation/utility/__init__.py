"""Evaluation of utility: accuracy, perplexity and drift of arms, report."""
