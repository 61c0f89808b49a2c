"""Evaluation: suites, metrics, reports. Needs an engine, imports none."""
