"""Examines the machines of a run before it starts: one page says what is wrong, and what to do."""
