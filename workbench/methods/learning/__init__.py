"""Methods that choose which examples of a pool to learn from."""
