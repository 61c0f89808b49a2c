"""Runtime that all jobs share: Ray session, engine pool, caches, run state."""
