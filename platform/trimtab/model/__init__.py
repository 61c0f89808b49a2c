"""Frozen base model: loading, chat template, injected vectors and objective inputs."""
