"""A run on disk: its directory, its checkpoints, what ran, and how it ended. Imports no torch."""
