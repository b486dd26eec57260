"""Methods that write text, token by token: plainly, or with drafts that a target verifies."""
