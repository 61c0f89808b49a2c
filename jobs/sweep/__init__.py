"""Job of `trimtab sweep`."""
