"""Ways to pool the vectors of a sequence's bases into one. Imports no torch."""

import re

from caduceus.errors import UserError

POOLS = ("mean", "max", "centre")
_MIDDLE = re.compile(r"middle:(\d+):(\d+)")


def check_pool(pool: str, *others: str) -> None:
    """Raise `UserError` unless `pool` is one of `POOLS` or `others`, or middle:BEFORE:AFTER."""
    middle = _MIDDLE.fullmatch(pool)
    if middle is not None and int(middle[1]) + int(middle[2]) == 0:
        raise UserError(f"--pool: {pool} contains no base")
    if middle is None and pool not in (*POOLS, *others):
        known = ", ".join([*POOLS, "middle:BEFORE:AFTER", *others])
        raise UserError(f"--pool: choose one of {known}, got {pool!r}")


def stretch(pool: str, length: int) -> tuple[int, int]:
    """Start and end of the bases of a sequence whose vectors are pooled.

    The centre is base length // 2; `middle:256:384` begins 256 bases before it, and ends 384 bases after it
    (exclusive).
    """
    middle, centre = _MIDDLE.fullmatch(pool), length // 2
    if middle is not None:
        start = max(centre - int(middle[1]), 0)
        return start, max(min(centre + int(middle[2]), length), start + 1)
    return (centre, centre + 1) if pool == "centre" else (0, length)
