"""What methods are tried on: per family a protocol, toys with a closed form, an embedded model, the user's own."""
