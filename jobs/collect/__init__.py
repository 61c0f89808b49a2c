"""Job of `trimtab collect`: answers, labels and signals of questions."""
