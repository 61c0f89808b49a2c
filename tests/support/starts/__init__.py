"""Count of the expensive services that a test run starts."""
