"""General helpers: files, remote paths, ports, method registry."""
