"""What answers requests: Ray Serve replicas of the online engine."""
