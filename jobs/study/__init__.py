"""Job of `trimtab study`."""
