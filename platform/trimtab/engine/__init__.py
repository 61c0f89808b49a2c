"""vLLM with prefixes: the only place that imports vllm."""
