"""The experiment: which method predicts best where, with the prior chosen without validation data."""
