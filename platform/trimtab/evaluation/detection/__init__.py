"""Evaluation of detectors: metrics, pooling over seeds, report."""
