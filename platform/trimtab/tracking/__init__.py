"""MLflow tracking: runs, model registry and lineage. No other package imports mlflow."""
