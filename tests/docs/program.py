"""Runs a program that a page shows: python -m tests.docs.program TEXT"""

import sys

exec(compile(sys.argv[1], "<page>", "exec"), {"__name__": "__main__"})
