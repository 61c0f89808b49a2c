"""Training and evaluation data: reading, balancing, splitting, filtering."""
