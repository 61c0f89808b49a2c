"""The `trimtab gc` job: removal of unused files."""
