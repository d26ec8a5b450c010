"""Reading and writing: checkpoints, logs and weights of other libraries."""
