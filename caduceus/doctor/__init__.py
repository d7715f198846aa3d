"""Looks at the machines of a run before it starts: one page with what is wrong, and what to do."""
