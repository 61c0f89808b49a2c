"""Frozen base models: loading, chat templates, prefix insertion and objective inputs."""
