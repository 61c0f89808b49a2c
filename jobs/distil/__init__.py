"""Job of `trimtab distil`."""
