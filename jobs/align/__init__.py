"""Job of `trimtab align`: data set, targets, training, evaluation, registration."""
