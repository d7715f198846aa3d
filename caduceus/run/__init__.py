"""A run on disk: its directory, its checkpoints, and what ran. Imports no torch."""
