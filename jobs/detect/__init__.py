"""Jobs of `trimtab detect` and `trimtab evaluate truth`."""
