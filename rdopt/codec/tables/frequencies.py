"""Integer frequency tables: counts to frequencies of a fixed total, and frequencies to bits.

The file holds integers only; encoder and decoder build the coder's model from the same integers.
"""

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader, BitWriter, unzigzag, zigzag

PRECISION = 14  # log2 of what the frequencies of a table sum to, in every coder


def normalize(counts: Int[np.ndarray, " k"], precision: int = PRECISION) -> Int[np.ndarray, " k"]:
    """Frequencies that sum to 2^precision, at least 1 where the count is positive, 0 where it is zero.

    Largest remainders; what the floor of 1 overspends is taken from the most frequent symbols.

    Raises:
        ValueError: all counts are zero, or more symbols occur than the total can hold.
    """
    total, target = int(counts.sum()), 1 << precision
    present = counts > 0
    if total == 0 or present.sum() > target:
        raise ValueError(f"a table of {int(present.sum())} symbols does not fit a total of {target}")
    share = counts.astype(np.float64) * target / total
    freq = np.where(present, np.maximum(np.floor(share), 1), 0).astype(np.int64)
    order = np.argsort(freq - share, kind="stable")
    order = order[present[order]]
    missing = target - int(freq.sum())
    if missing > 0:
        freq[order[:missing]] += 1
    while missing < 0:
        top = int(np.argmax(freq))
        cut = min(-missing, int(freq[top]) - 1, max(1, int(freq[top]) // 8))
        freq[top] -= cut
        missing += cut
    return freq


def ideal_bits(counts: Int[np.ndarray, " k"], freq: Int[np.ndarray, " k"]) -> float:
    """Code length in bits of symbols with these counts under the frequencies: sum n_k log2(sum f / f_k)."""
    used = counts > 0
    return float(np.sum(counts[used] * (np.log2(freq.sum()) - np.log2(freq[used]))))


def write_table(out: BitWriter, low: int, freq: Int[np.ndarray, " k"]) -> None:
    """Appends a table: lowest symbol, number of symbols, their frequencies, all as Elias gamma codes."""
    out.gamma(zigzag(low))
    out.gamma(len(freq))
    out.gammas(freq)


def read_table(source: BitReader, precision: int = PRECISION) -> tuple[int, Int[np.ndarray, " k"]]:
    """Reads what `write_table` wrote.

    Raises:
        ValueError: the frequencies do not sum to 2^precision.
    """
    low = unzigzag(source.gamma())
    freq = np.array(source.gammas(source.gamma()), np.int64)
    if freq.sum() != 1 << precision:
        raise ValueError(f"a table sums to {int(freq.sum())}, not {1 << precision}")
    return low, freq


def probabilities(freq: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """The frequencies as exact float64 multiples of a power of two."""
    return freq / float(1 << int(freq.sum()).bit_length() - 1)


def symmetric(freq: Int[np.ndarray, " k"]) -> Int[np.ndarray, " m"]:
    """Frequencies over -(k-1)..k-1 from those of |z|: each sign gets the magnitude's, zero its own twice."""
    return np.concatenate([freq[:0:-1], [2 * freq[0]], freq[1:]])
