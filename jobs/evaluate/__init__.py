"""Jobs of `trimtab evaluate safety` and `trimtab evaluate utility`."""
