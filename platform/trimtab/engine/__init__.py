"""vLLM engines with prefixes and detectors. No other package of trimtab imports vLLM."""
