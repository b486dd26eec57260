"""Searches over schedules: what each found, on which seeds, and what the search itself cost."""
