"""Text processing without models: normalization, numbers, refusal phrases."""
