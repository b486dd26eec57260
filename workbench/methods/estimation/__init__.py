"""Methods that buy a number with looks at data."""
