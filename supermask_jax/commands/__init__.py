"""What the subcommands of `python -m supermask_jax` do. Each returns the lines that `__main__` prints."""
