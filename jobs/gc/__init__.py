"""Job of `trimtab gc`."""
