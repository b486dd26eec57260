"""What each family shows in the explorer."""
