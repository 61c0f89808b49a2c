"""The `trimtab drift` job: comparison of live traffic with training data."""
