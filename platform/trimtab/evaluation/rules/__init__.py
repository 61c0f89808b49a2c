"""Rules of a system prompt, and how often answers obey them."""
