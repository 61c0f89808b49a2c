"""Statistics: confidence intervals and logistic regression."""
