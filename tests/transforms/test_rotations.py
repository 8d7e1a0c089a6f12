"""Rotations: orthogonal by construction, trained by Optax, exported in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.stats
from conftest import orthogonality_error
from hypothesis import given, settings
from hypothesis import strategies as st

from rdopt.transforms.matrices.cayley import (
    block_cayley,
    block_skew_size,
    cayley,
    skew,
    skew_size,
)
from rdopt.transforms.matrices.givens import (
    apply_givens,
    as_pairs,
    butterfly,
    givens_matrix,
    pair_count,
    round_robin,
    stacked_butterflies,
)
from rdopt.transforms.matrices.gradients import inverse
from rdopt.transforms.matrices.hadamard import hadamard
from rdopt.transforms.matrices.pca import pca
from rdopt.transforms.matrices.random import random_orthogonal
from rdopt.transforms.matrices.rotations import rotated, rotation_record, rotation_shapes
from rdopt.transforms.records import TransformRecord, rebuild
from rdopt.transforms.stored.rotation import Rotation

WIDTHS = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@settings(max_examples=40, deadline=None)
@given(WIDTHS, SEEDS)
def test_cayley_is_orthogonal_to_float64_rounding_with_determinant_one(n, seed):
    Q = cayley(normal(seed, skew_size(n)), n)
    assert orthogonality_error(Q) < 1e-12
    assert abs(np.linalg.det(Q) - 1) < 1e-9


def test_cayley_of_a_plane_turns_by_twice_the_arctangent():
    t = 0.3
    angle = 2 * np.arctan(t)
    expected = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    np.testing.assert_allclose(cayley(np.array([t]), 2), expected, atol=1e-15)


def test_cayley_is_half_the_exponential_map_to_second_order():
    theta = 1e-3 * normal(0, skew_size(6))
    np.testing.assert_allclose(cayley(theta, 6), scipy.linalg.expm(-2 * skew(theta, 6)), atol=1e-7)


def test_cayley_batches_over_layers_and_heads_and_agrees_with_vmap():
    theta = jnp.asarray(normal(1, 2, 3, skew_size(5)), jnp.float32)
    batched = cayley(theta, 5)
    mapped = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda t: cayley(t, 5))))(theta))
    np.testing.assert_allclose(np.asarray(batched), mapped, atol=1e-6)
    np.testing.assert_allclose(batched[1, 2], cayley(np.asarray(theta, np.float64)[1, 2], 5), atol=1e-6)


def test_cayley_gradient_matches_finite_differences_in_float64():
    theta, direction, weight = normal(3, skew_size(4)), normal(4, skew_size(4)), normal(5, 4, 4)
    analytic = jax.grad(lambda t: jnp.sum(cayley(t, 4) * weight.astype(np.float32)))(
        jnp.asarray(theta, jnp.float32)
    )
    ahead, behind = cayley(theta + 1e-6 * direction, 4), cayley(theta - 1e-6 * direction, 4)
    numeric = np.sum((ahead - behind) * weight) / 2e-6
    np.testing.assert_allclose(np.asarray(analytic) @ direction, numeric, rtol=1e-4)


def plain_cayley(theta, n):
    """The definition, differentiated by JAX."""
    S, eye = skew(theta, n), jnp.eye(n, dtype=theta.dtype)
    return jnp.linalg.solve(eye + S, eye - S)


@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_cayley_gradient_is_that_of_the_plain_solve_in_float64(n, shape):
    with jax.enable_x64(True):
        theta, weight = jnp.asarray(normal(3, *shape, skew_size(n))), jnp.asarray(normal(4, *shape, n, n))
        found, expected = (
            jax.jit(jax.value_and_grad(lambda t, f=f: jnp.sum(weight * jnp.sin(f(t, n)))))(theta)
            for f in (cayley, plain_cayley)
        )
        assert orthogonality_error(cayley(theta, n)) < 1e-12
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [3, 64, 200])
def test_cayley_of_jax_is_orthogonal_to_float32_rounding(n):
    assert orthogonality_error(cayley(jnp.asarray(normal(5, skew_size(n)) / np.sqrt(n), jnp.float32), n)) < 1e-5


def test_cayley_and_its_gradient_take_one_factorisation_of_one_matrix_at_a_time():
    loss = jax.jit(jax.value_and_grad(lambda t: jnp.sum(jnp.sin(cayley(t, 6)))))
    program = loss.lower(jnp.ones((2, skew_size(6)))).as_text().splitlines()
    factorisations = [line for line in program if "custom_call @lapack_sgetrf" in line]
    assert len(factorisations) == 1
    assert "tensor<6x6xf32>" in factorisations[0] and "x6x6xf32" not in factorisations[0].replace("<6x6xf32", "")
    assert sum("custom_call @lapack_strsm" in line for line in program) == 2


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_inverse_and_its_gradient_are_the_librarys(shape, n):
    with jax.enable_x64(True):
        A = jnp.asarray(normal(6, *shape, n, n) + 3 * np.eye(n))
        weight = jnp.asarray(normal(7, *shape, n, n))
        found, expected = (
            jax.jit(jax.value_and_grad(lambda A, f=f: jnp.sum(weight * f(A))))(A) for f in (inverse, jnp.linalg.inv)
        )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-10, atol=1e-12)


def test_many_factorisations_at_once_end():
    """Two batched ones used to wait for each other's threads for ever in a pool of two."""
    A = jnp.asarray(normal(8, 12, 96, 96) + 20 * np.eye(96), jnp.float32)

    @jax.jit
    def several(A):
        return sum(inverse(A + k * jnp.eye(96)) for k in range(4))

    expected = sum(np.linalg.inv(np.asarray(A, np.float64) + k * np.eye(96)) for k in range(4))
    np.testing.assert_allclose(several(A), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(WIDTHS, st.integers(1, 12), SEEDS)
def test_block_cayley_is_the_cayleys_of_its_blocks_and_applies_like_their_diagonal_matrix(n, block, seed):
    theta = normal(seed, block_skew_size(n, block))
    full, rest = divmod(n, block)
    m = skew_size(block)
    parts = [cayley(theta[k * m : (k + 1) * m], block) for k in range(full)]
    parts += [cayley(theta[full * m :], rest)] if rest else []
    blocks, last = block_cayley(theta, n, block)
    Q = np.asarray(scipy.linalg.block_diag(*parts))
    np.testing.assert_allclose(np.asarray(scipy.linalg.block_diag(*blocks, last))[:n, :n], Q, atol=1e-14)
    x = normal(seed, 3, n)
    np.testing.assert_allclose(np.asarray(Rotation(blocks=(blocks, last[None])).apply(x)), x @ Q, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(WIDTHS, SEEDS)
def test_givens_butterfly_is_orthogonal_and_mixes_every_pair_for_any_width(n, seed):
    pairs = butterfly(n)
    G = givens_matrix(normal(seed, pair_count(pairs)), pairs, n)
    assert orthogonality_error(G) < 1e-12
    assert np.all(G != 0)
    assert pair_count(pairs) <= n * max(np.ceil(np.log2(n)), 1)


def test_givens_butterfly_of_a_power_of_two_has_log2_full_layers():
    assert [len(layer) for layer in butterfly(16)] == [8] * 4


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 24), SEEDS)
def test_givens_layers_are_the_product_of_their_plane_rotations(n, seed):
    pairs = round_robin(n, 3)
    angles = normal(seed, pair_count(pairs))
    expected = np.eye(n)
    for (i, j), angle in zip(np.concatenate(pairs), angles, strict=True):
        plane = np.eye(n)
        plane[[i, j], [i, j]] = np.cos(angle)
        plane[i, j], plane[j, i] = np.sin(angle), -np.sin(angle)
        expected = expected @ plane
    x = normal(seed, 2, 5, n)
    np.testing.assert_allclose(apply_givens(x, angles, pairs), x @ expected, atol=1e-12)


@pytest.mark.parametrize("make", [butterfly, lambda n: round_robin(n, 3)])
def test_givens_gradient_is_that_of_the_product_of_plane_rotations_in_float64(make):
    n, pairs = 7, make(7)
    order = np.concatenate(pairs)

    def plain(x, angles):
        G = jnp.eye(n, dtype=x.dtype)
        for k, (i, j) in enumerate(order):
            c, s = jnp.cos(angles[k]), jnp.sin(angles[k])
            G = G @ jnp.eye(n, dtype=x.dtype).at[[i, j], [i, j]].set(c).at[i, j].set(s).at[j, i].set(-s)
        return x @ G

    def ours(x, angles):
        return apply_givens(x, angles, pairs)

    with jax.enable_x64(True):
        angles = jnp.asarray(normal(11, 2, pair_count(pairs)))
        x, weight = (jnp.asarray(normal(seed, 2, 3, 2, n)) for seed in (12, 13))
        found, expected = (
            jax.jit(jax.grad(lambda x, a, f=f: jnp.sum(weight * jnp.sin(f(x, a))), argnums=(0, 1)))(x, angles)
            for f in (ours, jax.vmap(plain))
        )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("n", [2, 7, 12])
def test_round_robin_meets_every_pair_once(n):
    rounds = n - 1 + n % 2
    met = [tuple(pair) for layer in round_robin(n, rounds) for pair in layer.tolist()]
    assert len(met) == len(set(met)) == n * (n - 1) // 2


@pytest.mark.parametrize("layers", [[[(0, 1), (1, 2)]], [[(0, 5)]]])
def test_pairs_that_meet_or_leave_the_width_are_refused(layers):
    with pytest.raises(ValueError, match="layer 0"):
        as_pairs(layers, 4)


def test_pca_diagonalises_with_falling_variances_and_fixed_signs():
    x = normal(6, 200, 9) * np.arange(1, 10)
    gram = x.T @ x
    Q = pca(gram)
    values = np.linalg.eigvalsh(gram)[::-1]
    np.testing.assert_allclose(Q.T @ gram @ Q, np.diag(values), atol=1e-8 * values[0])
    assert np.all(np.diff(values) <= 0) and orthogonality_error(Q) < 1e-13
    assert np.all(Q[np.argmax(np.abs(Q), axis=0), np.arange(9)] > 0)
    np.testing.assert_allclose(pca(jnp.asarray(gram, jnp.float32)), Q, atol=1e-3)


def test_random_orthogonal_is_haar_in_its_entries_and_its_trace():
    Q = random_orthogonal(0, 3, (4000,))
    # a coordinate of a uniform point of the 2-sphere is uniform; E tr(Q)^2 = 1 under Haar measure
    assert scipy.stats.kstest(Q[:, 0, 0], "uniform", (-1, 2)).pvalue > 1e-3
    assert scipy.stats.kstest(Q[:, 2, 1], "uniform", (-1, 2)).pvalue > 1e-3
    assert abs(np.mean(np.trace(Q, axis1=1, axis2=2) ** 2) - 1) < 0.1
    assert abs(np.mean(np.linalg.det(Q))) < 0.06
    np.testing.assert_array_equal(random_orthogonal(7, 5), random_orthogonal(7, 5))


@pytest.mark.parametrize("n", [2, 16, 24, 33])
def test_stacked_butterflies_meet_new_pairs_of_axes_with_every_layer(n):
    pairs = stacked_butterflies(n, 4)
    as_pairs(pairs, n)  # disjoint, and inside the width
    one, four = ({tuple(pair) for layer in layers for pair in layer.tolist()} for layers in (butterfly(n), pairs))
    assert pair_count(pairs) == 4 * pair_count(butterfly(n))
    assert one <= four and all(i < j for i, j in four)
    assert len(four) > 1.6 * len(one) or len(four) == n * (n - 1) // 2


@pytest.mark.parametrize("kind", ["cayley", "givens"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_hundred_adam_steps_lower_the_loss_and_stay_orthogonal(kind, batch):
    q0 = np.broadcast_to(hadamard(12), (*batch, 12, 12))
    rng = np.random.default_rng(0)
    gram = jnp.asarray(np.cov(rng.standard_normal((12, 50)) * np.arange(1, 13)[:, None]), jnp.float32)
    params = {k: jnp.zeros(shape) for k, shape in rotation_shapes(kind, 12, batch).items()}
    basis = jnp.asarray(q0, jnp.float32)
    np.testing.assert_array_equal(rotated(kind, params, basis), basis)

    def loss(params):
        Q = rotated(kind, params, basis)
        turned = jnp.einsum("...ji,jk,...ki->...i", Q, gram, Q, precision="highest")
        return jnp.sum(jnp.log(turned))  # least where Q is the eigenbasis

    optimizer = optax.adam(0.05)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=100)

    (params, _), values = train(params)
    assert values[-1] < values[0] - 0.5
    trained = rotated(kind, params, basis)
    assert orthogonality_error(trained) <= 1e-5
    base = TransformRecord(kind="matrix", site="", shape=q0.shape, parameters={"matrix": q0})
    exported = rebuild(rotation_record(kind, params, "", 12, base))
    assert exported.dtype == np.float64 and orthogonality_error(exported) < 1e-12
    np.testing.assert_allclose(trained, exported, atol=1e-5)
