"""Registry access of the server: artifact sources and coordination of versions between replicas."""
