"""Evaluation of arms and detectors: metrics, comparisons and reports, independent of the engine."""
