"""Searches over schedules: what each found, on which seeds, and what the search itself cost."""

from workbench.search._history import Entry, History, Score, read_history

__all__ = ["Entry", "History", "Score", "read_history"]
