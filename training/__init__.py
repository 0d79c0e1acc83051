"""The training application: data, models, the training loop, and the command-line programs over them."""

import os

# On some processors jaxlib 0.10.1 prints two lines of 2,000 characters for each compiled program that it reads from the
# cache. What goes wrong in earnest comes as an exception. The level is read when jax is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
