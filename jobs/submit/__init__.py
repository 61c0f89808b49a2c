"""Job of `trimtab submit` and `trimtab jobs`."""
