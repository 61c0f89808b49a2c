"""Detectors in the engine: selection, risk of each request, signal client."""
