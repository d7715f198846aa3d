"""A run on disk. Imports no torch."""
