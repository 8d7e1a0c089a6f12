"""Fixed coordinates: the bases that learning starts from and is compared with.

identity leaves the weights; hadamard and random flatten (QuaRot 2404.00456); dct and fourier turn to frequencies over
the channel index; pca aligns with the weights (the eigenvectors of the sum of their normalised Gram matrices), pca-act
with the activations (SliceGPT 2401.15024); joint diagonalises the moments of all matrices together as far as one
rotation can (Pham 2001), which is what a rate asks for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.calibration.moments import Moments
from rdopt.checkpoint.families import INPUT_OF, MATRICES, Architecture
from rdopt.operator.params import Params
from rdopt.transforms.gauges.gauges import Gauges
from rdopt.transforms.matrices.frequency import dct, fourier
from rdopt.transforms.matrices.hadamard import hadamard
from rdopt.transforms.matrices.jacobi import joint_diagonalizer
from rdopt.transforms.matrices.pca import pca
from rdopt.transforms.matrices.random import random_orthogonal

BASES = ("identity", "hadamard", "random", "dct", "fourier", "pca", "pca-act", "joint")
# Added to every moment before its logarithm counts, as a share of its mean diagonal: a column below this power costs no
# bits at the usual rates, so that making it smaller still must not pay.
FLOOR = 0.05


def starting_gauges(kind: str, params: Params, arch: Architecture, moments: Moments, seed: int = 0) -> Gauges:
    """The gauges of a fixed basis, float64.

    Args:
        kind: one of BASES.
        params: the original weights (gains not folded).
        arch: their architecture.
        moments: the second moments (read by pca-act).
        seed: of the random rotation and of the Hadamard's signs.

    Returns:
        residual rotation and value rotations; none for identity.
    """
    d, h = arch.hidden_size, arch.head_dim
    heads = (arch.num_layers, arch.num_kv_heads)
    if kind == "identity":
        return Gauges()
    if kind == "hadamard":
        # Random signs first, so that a constant direction of the stream does not land on one axis.
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], d)
        return Gauges(signs[:, None] * hadamard(d), np.broadcast_to(hadamard(h), (*heads, h, h)).copy())
    if kind == "random":
        return Gauges(random_orthogonal(seed, d), random_orthogonal(seed + 1, h, heads))
    if kind in ("dct", "fourier"):
        basis = dct if kind == "dct" else fourier
        return Gauges(basis(d), np.broadcast_to(basis(h).T, (*heads, h, h)).copy())
    if kind == "pca":
        return Gauges(pca(residual_gram(params, arch)), np.swapaxes(pca(value_gram(params, arch)), -1, -2))
    if kind == "pca-act":
        value = _head_blocks(moments.sigma["o"], arch)
        return Gauges(pca(residual_activation(params, moments)), np.swapaxes(pca(value), -1, -2))
    if kind == "joint":
        return joint_gauges(params, arch)
    raise ValueError(f"basis {kind!r} is none of {', '.join(BASES)}")


def joint_gauges(params: Params, arch: Architecture) -> Gauges:
    """Rotations that diagonalise, as far as one can, the moments of all matrices that share a basis.

    Rows count alike, as they do where each has its own step and spread: every row is divided by its norm.
    """
    kv, h, group = arch.num_kv_heads, arch.head_dim, arch.num_heads // arch.num_kv_heads
    stream, heads = [], []
    for layer in range(arch.num_layers):
        W = {k: np.asarray(params["blocks"][k][layer], np.float64) for k in MATRICES}
        for name in MATRICES:
            norm = f"{INPUT_OF[name]}_norm"
            stream.append(W[name].T if norm not in params["blocks"] else W[name] * params["blocks"][norm][layer])
        values = stream[-len(MATRICES) + MATRICES.index("v")].reshape(kv, h, -1)
        readers = W["o"].reshape(-1, kv, group, h).transpose(1, 2, 0, 3)
        heads.append([_joint_axes([values[k].T, *readers[k]]) for k in range(kv)])
    return Gauges(_joint_axes(stream), np.swapaxes(np.array(heads), -1, -2))


def _joint_axes(matrices: Sequence[Float[np.ndarray, "_ n"]]) -> Float[np.ndarray, "n n"]:
    """The joint diagonaliser of the second moments of the rows, each row of norm one."""
    C, weights = row_moments(matrices)
    return joint_diagonalizer(C, weights, start=pca(np.einsum("k,kij->ij", weights, C)))


def row_moments(
    matrices: Sequence[Float[np.ndarray, "_ n"]], floor: float = FLOOR
) -> tuple[Float[np.ndarray, "k n n"], Float[np.ndarray, " k"]]:
    """What `joint_cost` judges a basis by.

    Args:
        matrices: that share an input, (rows, n).
        floor: added to the diagonal, as a share of its mean.

    Returns:
        (C, weights): second moments of the rows, each row of norm one, float64, and the numbers of rows.
    """
    unit = [W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-30) for W in matrices]
    C = np.array([X.T @ X / len(X) for X in unit])
    n = C.shape[1]
    C += floor * np.trace(C, axis1=1, axis2=2)[:, None, None] / n * np.eye(n)
    return C, np.array([float(len(X)) for X in unit])


def residual_gram(params: Params, arch: Architecture) -> Float[np.ndarray, "d d"]:
    """Sum of W^T W of the consumers (gains folded) and W W^T of the producers, each divided by its trace."""
    total = np.zeros((arch.hidden_size, arch.hidden_size))
    for layer in range(arch.num_layers):
        for name in ("q", "k", "v", "gate", "up", "o", "down"):
            W = np.asarray(params["blocks"][name][layer], np.float64)
            if name in ("o", "down"):
                gram = W @ W.T
            else:
                W = W * params["blocks"][INPUT_OF[name] + "_norm"][layer]
                gram = W.T @ W
            total += gram / np.trace(gram)
    return total


def value_gram(params: Params, arch: Architecture) -> Float[np.ndarray, "layers kv h h"]:
    """Per value head: W_v W_v^T plus W_o^T W_o of its query group, each divided by its trace."""
    kv, h, group = arch.num_kv_heads, arch.head_dim, arch.num_heads // arch.num_kv_heads
    out = np.zeros((arch.num_layers, kv, h, h))
    for layer in range(arch.num_layers):
        v = np.asarray(params["blocks"]["v"][layer], np.float64) * params["blocks"]["attn_norm"][layer]
        o = np.asarray(params["blocks"]["o"][layer], np.float64).reshape(-1, kv, group, h)
        rows = v.reshape(kv, h, -1)
        produced = np.einsum("khd,kgd->khg", rows, rows)
        consumed = np.einsum("dkgi,dkgj->kij", o, o)
        traces = [np.trace(x, axis1=1, axis2=2)[:, None, None] for x in (produced, consumed)]
        out[layer] = produced / traces[0] + consumed / traces[1]
    return out


def residual_activation(params: Params, moments: Moments) -> Float[np.ndarray, "d d"]:
    """Sum over norm sites of the second moment of the normalised stream before the gain, each over its trace."""
    total = np.zeros(moments.sigma["attn"].shape[1:])
    for site in ("attn", "mlp"):
        for sigma, gain in zip(moments.sigma[site], params["blocks"][site + "_norm"], strict=True):
            moment = sigma / np.outer(gain, gain).astype(np.float64)
            total += moment / np.trace(moment)
    return total


def _head_blocks(sigma: Any, arch: Architecture) -> Float[np.ndarray, "layers kv h h"]:
    """The diagonal blocks of o_proj's input moment, summed over the query heads of a group; one layer at a time."""
    kv, h, group = arch.num_kv_heads, arch.head_dim, arch.num_heads // arch.num_kv_heads
    return np.stack([np.einsum("kgikgj->kij", S.reshape(kv, group, h, kv, group, h)) for S in sigma])
