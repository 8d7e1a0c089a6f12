"""Bit strings of small integers: Elias gamma codes (Elias 1975), most significant bit first."""

from collections.abc import Iterable
from typing import SupportsInt

import numpy as np


class BitWriter:
    """Collects Elias gamma codes and returns them as bytes, padded with zeros."""

    def __init__(self) -> None:
        self._text: list[str] = []

    def gamma(self, value: int) -> None:
        """Appends value >= 0 as the Elias gamma code of value + 1 (2 floor(log2(value + 1)) + 1 bits)."""
        digits = format(value + 1, "b")
        self._text.append("0" * (len(digits) - 1) + digits)

    def gammas(self, values: Iterable[SupportsInt]) -> None:
        """Appends several values."""
        for value in values:
            self.gamma(int(value))

    def bytes(self) -> bytes:
        """The codes so far."""
        text = "".join(self._text)
        bits = np.frombuffer(text.encode(), np.uint8) - ord("0")
        return np.packbits(bits).tobytes()


class BitReader:
    """Reads back what `BitWriter` wrote; raises ValueError past the end."""

    def __init__(self, data: bytes) -> None:
        self._text = (np.unpackbits(np.frombuffer(data, np.uint8)) + ord("0")).tobytes()
        self._at = 0

    @property
    def bytes_read(self) -> int:
        """Bytes begun so far; the writer padded its last one."""
        return (self._at + 7) // 8

    def gamma(self) -> int:
        """The next value."""
        one = self._text.find(b"1", self._at)
        end = 2 * one - self._at + 1
        if one < 0 or end > len(self._text):
            raise ValueError("a table ends before its last entry")
        value = int(self._text[one:end], 2) - 1
        self._at = end
        return value

    def gammas(self, count: int) -> list[int]:
        """The next `count` values."""
        return [self.gamma() for _ in range(count)]


def zigzag(value: int) -> int:
    """Maps 0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(code: int) -> int:
    """Inverse of `zigzag`."""
    return code // 2 if code % 2 == 0 else -(code + 1) // 2
