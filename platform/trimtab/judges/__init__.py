"""Judges: what an answer is. Refusal judges here; answer judges for detectors stand beside them."""
