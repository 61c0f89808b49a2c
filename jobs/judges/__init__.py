"""Job of `trimtab judges`, and the judge runner that other jobs share."""
