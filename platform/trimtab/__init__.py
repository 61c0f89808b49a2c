"""trimtab: steer and check frozen language models with tiny learned parts."""
