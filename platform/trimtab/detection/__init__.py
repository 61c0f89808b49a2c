"""Detectors: signals, training, calibration and file format."""
