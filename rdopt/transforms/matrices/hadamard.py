"""Hadamard-like orthogonal matrices of any width, generated: nothing is read from a table.

A width is split into the largest order that Sylvester's (1867) and Paley's (1933) constructions and their
Kronecker products reach, times a remainder, which gets the bordered-off core of a Hadamard matrix or a
Hartley matrix.
"""

from functools import lru_cache, reduce
from itertools import product

import numpy as np
from jaxtyping import Float, Int


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    p = next((f for f in range(2, int(q**0.5) + 1) if q % f == 0), q)
    k = 0
    while q > 1 and q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 and k else None


def _squares(p: int, k: int) -> set[tuple[int, ...]]:
    """Nonzero squares of GF(p^k), as coefficients of polynomials, the lowest first."""
    if k == 1:
        return {(a * a % p,) for a in range(1, p)}
    for modulus in product(range(p), repeat=k):  # what x^k is in lower powers
        exponents: dict[tuple[int, ...], int] = {}
        power = (1,) + (0,) * (k - 1)
        while power not in exponents and any(power):
            exponents[power] = len(exponents)
            *lower, lead = power
            power = tuple((a + lead * m) % p for a, m in zip((0, *lower), modulus, strict=True))
        # Where x generates the multiplicative group, its even powers are the squares.
        if len(exponents) == p**k - 1:
            return {power for power, exponent in exponents.items() if exponent % 2 == 0}
    raise AssertionError(f"no primitive polynomial of degree {k} over GF({p})")


def jacobsthal(q: int) -> Int[np.ndarray, "q q"]:
    """Quadratic character of x_i - x_j over GF(q), q an odd prime power: M M^T = q I - J, M J = 0."""
    field = prime_power(q)
    if field is None or field[0] == 2:
        raise ValueError(f"{q} is not an odd prime power")
    p, k = field
    weights = p ** np.arange(k)
    character = np.full(q, -1)
    character[0] = 0
    character[[int(np.dot(s, weights)) for s in _squares(p, k)]] = 1
    digits = np.arange(q)[:, None] // weights % p
    difference = (digits[:, None, :] - digits[None, :, :]) % p @ weights
    return character[difference]


def _paley_kind(n: int) -> str | None:
    if n % 4 == 0 and (n - 1) % 4 == 3 and prime_power(n - 1):
        return "I"
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and n // 2 > 2 and prime_power(n // 2 - 1):
        return "II"
    return None


def paley(n: int) -> Int[np.ndarray, "n n"]:
    """Hadamard matrix of +-1, order n = q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), q a prime power."""
    kind = _paley_kind(n)
    if kind is None:
        raise ValueError(f"Paley's constructions do not reach the order {n}")
    q = n - 1 if kind == "I" else n // 2 - 1
    border = np.ones((1, q), int)
    sign = -1 if kind == "I" else 1
    C = np.block([[np.zeros((1, 1), int), border], [sign * border.T, jacobsthal(q)]])
    if kind == "I":
        return C + np.eye(n, dtype=int)
    return np.kron(C, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1, dtype=int), [[1, -1], [-1, -1]])


@lru_cache(maxsize=4096)
def hadamard_orders(n: int) -> tuple[int, ...] | None:
    """Orders of 2 and of Paley whose product is n, or None when these constructions do not reach n."""
    if n == 1:
        return ()
    if n & (n - 1) == 0:
        return (2,) * (n.bit_length() - 1)
    if n % 4:
        return None
    if n % 8 == 0 and (half := hadamard_orders(n // 2)) is not None:
        return (2, *half)
    if _paley_kind(n):
        return (n,)
    for a in range(12, int(n**0.5) + 1, 4):
        if n % a == 0 and _paley_kind(a) and (rest := hadamard_orders(n // a)) is not None:
            return (a, *rest)
    return None


def hartley(m: int) -> Float[np.ndarray, "m m"]:
    """Orthogonal symmetric matrix of (cos + sin)(2 pi j k / m) / sqrt(m), no entry above sqrt(2 / m)."""
    phase = 2 * np.pi * (np.outer(np.arange(m), np.arange(m)) % m) / m
    return (np.cos(phase) + np.sin(phase)) / np.sqrt(m)


def remainder(m: int) -> Float[np.ndarray, "m m"]:
    """A flat orthogonal matrix of an order without a Hadamard matrix.

    If m + 1 has one, its core C (first row and column normalised to ones, then dropped) obeys C J = -J and
    C C^T = (m + 1) I - J, so (C + t J) / sqrt(m + 1) with m t^2 - 2 t - 1 = 0 is orthogonal; else a Hartley
    matrix.
    """
    orders = hadamard_orders(m + 1)
    if orders is None or m == 1:
        return hartley(m)
    H = _signs(orders)
    H = H * H[:1, :]
    H = H * H[:, :1]
    t = (1 - np.sqrt(m + 1)) / m
    return (H[1:, 1:] + t) / np.sqrt(m + 1)


def _signs(orders: tuple[int, ...]) -> Int[np.ndarray, "n n"]:
    """The Kronecker product of Hadamard matrices of these orders."""
    factors = (np.array([[1, 1], [1, -1]]) if order == 2 else paley(order) for order in orders)
    return reduce(np.kron, factors, np.ones((1, 1), int))


def _split(n: int) -> tuple[tuple[int, ...], int]:
    """(orders, rest) with the largest product of orders that divides n."""
    if n < 1:
        raise ValueError(f"a width of {n} has no orthogonal matrix")
    for rest in range(1, n + 1):
        if n % rest == 0 and (orders := hadamard_orders(n // rest)) is not None:
            return orders, rest
    raise AssertionError("order 1 always divides")


def hadamard(n: int) -> Float[np.ndarray, "n n"]:
    """Orthogonal float64 matrix of any width n: +-1 / sqrt(n) where the constructions reach, else near it."""
    orders, rest = _split(n)
    H = _signs(orders) / np.sqrt(n // rest)
    return np.kron(H, remainder(rest)) if rest > 1 else H


def sign_hadamard(n: int) -> Int[np.ndarray, "n n"]:
    """H of 0 and +-1 with H H^T = m I, m the largest order of a Hadamard matrix in reach that divides n."""
    orders, rest = _split(n)
    return np.kron(_signs(orders), np.eye(rest, dtype=int))
