"""Methods that spend less computation on an input."""
