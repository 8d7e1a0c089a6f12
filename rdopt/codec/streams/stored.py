"""The `transforms` stream: which sites a file's stored rotations stand at, their pairs and their angles."""

from collections.abc import Iterator
from functools import cache

import numpy as np
from jaxtyping import Int

from rdopt.checkpoint.families import Architecture, Key, group_widths, matrix_shapes
from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.coders.constriction import pack_integers, unpack_integers
from rdopt.codec.streams.fixed_point import MAX_BLOCK
from rdopt.transforms.matrices.cayley import block_skew_size
from rdopt.transforms.matrices.givens import butterfly
from rdopt.transforms.stored.angles import MAX_BITS, angle_pairs
from rdopt.transforms.stored.rotations import STRUCTURES, StoredRotation, StoredRotations

_CODINGS = ("plain", "one table", "a table per class")
_MAX_LAYERS = 64


def pack_stored(stored: StoredRotations | None, arch: Architecture) -> bytes:
    """Structure, sites and coding as gamma codes and bits, pairings, then the angles in the shortest coding."""
    if stored is None or not (stored.inputs or stored.outputs):
        return b""
    sides = stored.inputs, stored.outputs
    present = [key in sides[side] for side, key, _ in _places(arch)]
    sites = [(sides[side][key], n) for side, key, n in _places(arch) if key in sides[side]]
    codes = np.concatenate([site.codes for site, _ in sites]).astype(np.int32)
    classes = np.concatenate([_classes(stored, n) for _, n in sites])
    bodies = (
        _pack_plain(codes, stored.bits),
        pack_integers(codes),
        b"".join(pack_integers(codes[classes == k]) for k in range(int(classes.max(initial=-1)) + 1)),
    )
    coding = min(range(len(_CODINGS)), key=lambda i: len(bodies[i]))
    head = BitWriter()
    head.gammas((STRUCTURES.index(stored.structure), stored.size, stored.hadamard, stored.bits, coding))
    head.gammas(present)
    pairings = b""
    if stored.structure == "pairs":
        pairings = b"".join(pack_pairing(pairs, n) for site, n in sites for pairs in site.pairs or ())
    return head.bytes() + pairings + bodies[coding]


def unpack_stored(data: bytes, arch: Architecture) -> StoredRotations | None:
    """Inverse of `pack_stored`; raises ValueError for damaged bytes."""
    if not data:
        return None
    head = BitReader(data)
    structure, size, hadamard, bits, coding = head.gammas(5)
    largest = MAX_BLOCK if structure == 0 else _MAX_LAYERS
    if not (structure < len(STRUCTURES) and 1 <= size <= largest and hadamard < 2 and coding < len(_CODINGS)):
        raise ValueError(f"stored transforms of structure {structure}, size {size}, coding {coding}")
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"stored angles of {bits} bits")
    empty = StoredRotations(STRUCTURES[structure], size, bool(hadamard), bits, {}, {})
    every = [*_places(arch)]
    places = [place for place, there in zip(every, head.gammas(len(every)), strict=True) if there]
    data, pairings = data[head.bytes_read :], {}
    if empty.structure == "pairs":
        for side, key, n in places:
            for _ in range(size):
                pairs, data = unpack_pairing(data, n)
                pairings[side, key] = (*pairings.get((side, key), ()), pairs)
    classes = [_classes(empty, n) for _, _, n in places]
    parts = np.split(_unpack_angles(data, np.concatenate(classes), coding, bits), np.cumsum([*map(len, classes)])[:-1])
    rotations: tuple[dict[Key, StoredRotation], dict[Key, StoredRotation]] = ({}, {})
    for (side, key, _), codes in zip(places, parts, strict=True):
        rotations[side][key] = StoredRotation(codes, pairings.get((side, key)))
    return empty._replace(inputs=rotations[0], outputs=rotations[1])


def _places(arch: Architecture) -> Iterator[tuple[int, Key, int]]:
    """(0 for inputs or 1 for outputs, key, width) of every site that a file could have."""
    for key, n in group_widths(arch).items():
        yield 0, key, n
    for key, (m, _) in matrix_shapes(arch).items():
        yield 1, key, m


def _classes(stored: StoredRotations, n: int) -> Int[np.ndarray, " p"]:
    """What angles of one size have in common: in blocks floor(log2(i - j)) of the pair, elsewhere the layer."""
    if stored.structure == "blocks":
        return _octaves(n, stored.size)
    sizes = [len(x) for x in butterfly(n)] if stored.structure == "butterfly" else [n // 2] * stored.size
    return np.repeat(np.arange(len(sizes)), sizes)


@cache
def _octaves(n: int, block: int) -> Int[np.ndarray, " p"]:
    """floor(log2(i - j)) of every angle's pair: the longer a pivot has gathered, the smaller the angle."""
    full, last = ([(i - j).bit_length() - 1 for j, i in angle_pairs(b)] for b in (block, n % block))
    octaves = np.concatenate([np.tile(np.array(full, np.int64), n // block), np.array(last, np.int64)])
    assert len(octaves) == block_skew_size(n, block)
    return octaves


def pack_pairing(pairs: Int[np.ndarray, "half 2"], n: int) -> bytes:
    """One of the (n - 1)!! pairings of n coordinates (of n + 1 for an odd n) as its number, big-endian.

    The smallest coordinate that has no partner yet names its partner's rank among the others, and so on.

    Raises:
        ValueError: pairs in another order than i < j, i ascending, which the angles would not follow.
    """
    if np.any(pairs[:, 0] >= pairs[:, 1]) or np.any(np.diff(pairs[:, 0]) <= 0):
        raise ValueError("a file names pairs i < j in ascending order of i alone")
    partner = {int(i): int(j) for pair in pairs for i, j in (pair, pair[::-1])}
    alone = [i for i in range(n + n % 2) if i not in partner]
    partner |= dict(zip(alone, alone[::-1], strict=True))
    left, number = list(range(n + n % 2)), 0
    while left:
        first = left.pop(0)
        rank = left.index(partner[first])
        number = number * len(left) + rank
        left.pop(rank)
    return number.to_bytes(_pairing_size(n), "big")


def unpack_pairing(data: bytes, n: int) -> tuple[Int[np.ndarray, "half 2"], bytes]:
    """(pairs of `pack_pairing`, the bytes behind them); raises ValueError for damaged bytes."""
    size, even = _pairing_size(n), n + n % 2
    number = int.from_bytes(data[:size], "big")
    if len(data) < size or number >= _pairings(even):
        raise ValueError("a pairing of stored transforms is damaged")
    ranks = []
    for others in range(1, even, 2):
        number, rank = divmod(number, others)
        ranks.append(rank)
    left, pairs = list(range(even)), []
    for rank in reversed(ranks):
        first = left.pop(0)
        pairs.append((first, left.pop(rank)))
    return np.array([p for p in pairs if p[1] < n], np.int64).reshape(-1, 2), data[size:]


@cache
def _pairings(even: int) -> int:
    total = 1
    for others in range(1, even, 2):
        total *= others
    return total


def _pairing_size(n: int) -> int:
    return ((_pairings(n + n % 2) - 1).bit_length() + 7) // 8


def _unpack_angles(data: bytes, classes: Int[np.ndarray, " p"], coding: int, bits: int) -> Int[np.ndarray, " p"]:
    codes = np.zeros(len(classes), np.int32)
    if coding == 0:
        codes, data = _unpack_plain(data, len(codes), bits)
    elif coding == 1:
        codes, data = unpack_integers(data, len(codes))
    else:
        for k in range(int(classes.max(initial=-1)) + 1):
            codes[classes == k], data = unpack_integers(data, int(np.sum(classes == k)))
    if data:
        raise ValueError("the stored transforms do not end with their last angle")
    return codes


def _pack_plain(codes: Int[np.ndarray, " p"], bits: int) -> bytes:
    """bits - 1 bits an angle."""
    unsigned = codes + (2 ** (bits - 2) - 1)
    return np.packbits((unsigned[:, None] >> np.arange(bits - 2, -1, -1)) & 1).tobytes()


def _unpack_plain(data: bytes, count: int, bits: int) -> tuple[Int[np.ndarray, " p"], bytes]:
    size = (count * (bits - 1) + 7) // 8
    if len(data) < size:
        raise ValueError("the stored transforms end before their last angle")
    digits = np.unpackbits(np.frombuffer(data, np.uint8, size))[: count * (bits - 1)].reshape(count, bits - 1)
    unsigned = digits.astype(np.int32) @ (1 << np.arange(bits - 2, -1, -1, dtype=np.int32))
    return unsigned - np.int32(2 ** (bits - 2) - 1), data[size:]
