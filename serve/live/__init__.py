"""Storage of the signals of live answers, and labels for them."""
