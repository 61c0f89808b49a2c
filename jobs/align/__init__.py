"""The `trimtab align` job: dataset, targets, training, evaluation, registration."""
