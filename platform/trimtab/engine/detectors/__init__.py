"""Detectors of the engine: selection, risk of each request, policies, signal client."""
