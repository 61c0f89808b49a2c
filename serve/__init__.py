"""Server: Ray Serve replicas of the online engine."""
