"""Principal axes of a second moment (Karhunen-Loeve): columns by falling variance, signs fixed."""

from jaxtyping import Float

from rdopt.transforms.arrays import AnyArray, namespace


def spectrum(
    gram: Float[AnyArray, "*batch n n"],
) -> tuple[Float[AnyArray, "*batch n"], Float[AnyArray, "*batch n n"]]:
    """Eigenvalues, falling, and orthonormal eigenvectors (columns) of the symmetric part of ``gram``.

    Each column's entry of largest magnitude is positive.
    """
    xp = namespace(gram)
    values, vectors = xp.linalg.eigh((gram + gram.swapaxes(-1, -2)) / 2)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    peak = xp.argmax(xp.abs(vectors), axis=-2)[..., None, :]
    sign = xp.where(xp.take_along_axis(vectors, peak, axis=-2) < 0, -1.0, 1.0).astype(gram.dtype)
    return values, vectors * sign


def pca(gram: Float[AnyArray, "*batch n n"]) -> Float[AnyArray, "*batch n n"]:
    """Basis Q with Q^T gram Q diagonal and falling; rows x are expressed in it as x Q."""
    return spectrum(gram)[1]
