"""Runtime shared by all jobs: Ray session, engine pool, caches, run state."""
