"""ASGI middleware of a replica: access log, authentication, admission control."""
