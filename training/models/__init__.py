"""Networks the training programs can build."""
