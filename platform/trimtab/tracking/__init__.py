"""MLflow: runs, registry, lineage. The only place that imports mlflow."""
