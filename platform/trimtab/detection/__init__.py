"""Detectors: signals, training, calibration and the saved form."""
