"""Job of `trimtab collect`: answers with labels and signals."""
