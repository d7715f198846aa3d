"""Runs to watch."""

from tests.train.conftest import small_run

__all__ = ["small_run"]
