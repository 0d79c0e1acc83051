"""The training application: data, models, the training loop, and the command-line programs over them."""
