"""Job of `trimtab promote`."""
