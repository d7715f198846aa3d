"""The form of a sample in a tar: KEY.seq, then KEY.json, as POSIX ustar members with fixed owner, mode and time."""

import json

import numpy as np

BLOCK = 512
END = bytes(2 * BLOCK)
_NAME_BYTES = 100
_OWNER = b"0000644\0" + b"0000000\0" * 2  # mode, user, group
_TIME = b"00000000000\0"
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
_FIXED_SUM = sum(_OWNER + _TIME + b" " * 8 + _REST)


def member_header(name: str, size: int) -> bytes:
    """The 512-byte header of a file of `size` bytes; `name` is ASCII of at most 100 characters."""
    encoded = name.encode("ascii")
    assert len(encoded) <= _NAME_BYTES and size < 8**11
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(_NAME_BYTES, b"\0"), _OWNER, digits, _TIME, checksum, _REST))


def padding(size: int) -> bytes:
    """The zeros that fill a member's last block."""
    return bytes(-size % BLOCK)


def member_size(content: np.ndarray) -> np.ndarray:
    """Bytes (n,) int64 that members with contents of these sizes take in a tar, with header and padding."""
    return BLOCK + (content + BLOCK - 1) // BLOCK * BLOCK


class SampleJson:
    """KEY.json of the samples of one contig: {species, assembly, contig, split, start, end, strand[, pad]}."""

    def __init__(self, species: str, assembly: str, contig: str, split: str) -> None:
        self._prefix = json.dumps({"species": species, "assembly": assembly, "contig": contig, "split": split})[:-1]

    def encode(self, start: int, end: int, strand: str, pad: int) -> bytes:
        suffix = f', "pad": {pad}}}\n' if pad else "}\n"
        return f'{self._prefix}, "start": {start}, "end": {end}, "strand": "{strand}"{suffix}'.encode()

    @property
    def fixed_bytes(self) -> int:
        """Bytes of `encode` without the digits of start and end, and without the padding."""
        return len(self.encode(0, 0, "+", 0)) - 2


def json_sizes(fixed: np.ndarray, start: np.ndarray, end: np.ndarray, pad: np.ndarray) -> np.ndarray:
    """Bytes (n,) int64 of `SampleJson.encode` for each row; `fixed`: its `fixed_bytes`."""
    padded = np.where(pad > 0, len(', "pad": ') + decimal_digits(pad), 0)
    return fixed + decimal_digits(start) + decimal_digits(end) + padded


def decimal_digits(values: np.ndarray) -> np.ndarray:
    """Number of decimal digits of each value ≥ 0, (n,) int64."""
    powers = 10 ** np.arange(1, 19, dtype=np.int64)
    return 1 + np.searchsorted(powers, values.astype(np.int64), side="right")
