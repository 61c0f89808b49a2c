"""Command line of trimtab."""
