"""The `trimtab refresh` job: a detector that follows live traffic."""
