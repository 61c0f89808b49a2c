"""Registry on the server: artifact sources and coordination of versions between replicas."""
