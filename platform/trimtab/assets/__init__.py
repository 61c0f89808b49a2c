"""Downloadable models and data sets: catalog and download."""
