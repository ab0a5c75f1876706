"""CIFAR's residual networks: sizes by the paper's arithmetic, the function in NumPy, and batch statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import AS_JAX_DOES

from supermask_jax import models
from supermask_jax.trees import by_path

TINY = models.CifarResNet(5, depth=8, width=3)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes the time


def variables_of(model, channels=3):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, channels)))


@pytest.mark.parametrize(
    ("model", "depth", "total"),
    [
        (models.ResNet20(), 20, 268_336),
        (models.ResNet32(), 32, 461_872),
        (models.ResNet44(), 44, 655_408),
        (models.ResNet56(), 56, 848_944),
        pytest.param(models.ResNet110(), 110, 1_719_856, marks=pytest.mark.slow),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, models.CifarResNet) else None,
)
def test_the_weights_are_those_of_the_paper(model, depth, total):
    """3x3 kernels alone: the first, 2n of each stage, and no weight in a shortcut; then 64 x 10."""
    n = (depth - 2) // 6
    by_table = [
        9 * 3 * 16,
        2 * n * 9 * 16 * 16,
        9 * 16 * 32 + (2 * n - 1) * 9 * 32 * 32,
        9 * 32 * 64 + (2 * n - 1) * 9 * 64 * 64,
        64 * 10,
    ]
    sizes = {path: leaf.size for path, leaf in by_path(variables_of(model)["params"]).items()}
    stages = [sum(size for path, size in sizes.items() if path.startswith(f"stage_{i}")) for i in range(3)]
    assert [sizes["conv/kernel"], *stages, sizes["dense/kernel"]] == by_table
    assert sum(sizes.values()) == total and len(sizes) == depth


def test_affine_adds_a_scale_and_a_bias_for_every_channel_and_starts_as_without():
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    affine = TINY.clone(affine=True)
    plain, learned = (jit(model.init)(jax.random.key(0), x) for model in (TINY, affine))
    extra = by_path(learned["params"]).keys() - by_path(plain["params"]).keys()
    values = {path: by_path(learned["params"])[path] for path in extra}
    assert sum(leaf.size for leaf in values.values()) == 2 * (3 * 3 + 2 * 6 + 2 * 12)
    assert all(np.all(np.asarray(leaf) == (1 if path.endswith("scale") else 0)) for path, leaf in values.items())
    # In other fusions, last bits differ.
    one, other = (jax.jit(model.apply, compiler_options=AS_JAX_DOES) for model in (TINY, affine))
    np.testing.assert_array_equal(one(plain, x), other(learned, x))


def conv(x, kernel, stride):
    """3x3, padded by 1 on all sides, one output pixel at a time."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (range(0, size, stride) for size in x.shape[1:3])
    pixels = [[np.tensordot(padded[:, i : i + 3, j : j + 3], kernel, 3) for j in columns] for i in rows]
    return np.moveaxis(np.array(pixels), 2, 0)


def norm(x):
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


def published(kernels, x):
    y = np.maximum(norm(conv(x, kernels["conv/kernel"], 1)), 0)
    for stage in range(3):
        stride = 2 if stage else 1
        inner = np.maximum(norm(conv(y, kernels[f"stage_{stage}_block_0/conv_0/kernel"], stride)), 0)
        out = norm(conv(inner, kernels[f"stage_{stage}_block_0/conv_1/kernel"], 1))
        shortcut = np.zeros_like(out)
        shortcut[..., : y.shape[-1]] = y[:, ::stride, ::stride]
        y = np.maximum(out + shortcut, 0)
    return y.mean((1, 2)) @ kernels["dense/kernel"]


@functools.cache
def applied():
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    variables = jit(TINY.init)(jax.random.key(0), x)
    logits, new = jit(lambda v, x: TINY.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    return x, variables, logits, new["batch_stats"]


def test_it_is_the_published_function_with_shortcuts_without_weights():
    x, variables, logits, _ = applied()
    kernels = {path: np.asarray(leaf, np.float64) for path, leaf in by_path(variables["params"]).items()}
    np.testing.assert_allclose(logits, published(kernels, np.asarray(x, np.float64)), rtol=1e-3, atol=1e-4)


def test_batch_statistics_move_a_tenth_towards_the_batch_and_evaluation_uses_them():
    x, variables, logits, new = applied()
    first = conv(np.asarray(x, np.float64), np.asarray(variables["params"]["conv"]["kernel"], np.float64), 1)
    np.testing.assert_allclose(new["norm"]["mean"], 0.1 * first.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(new["norm"]["var"], 0.9 + 0.1 * first.var((0, 1, 2)), rtol=1e-3)
    evaluate = jit(TINY.apply)
    running = {"params": variables["params"], "batch_stats": new}
    together = evaluate(running, x)
    np.testing.assert_allclose(evaluate(running, x[:1]), together[:1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(together, logits, atol=1e-2)
    assert not np.allclose(together, evaluate(variables, x), atol=1e-3)


@pytest.mark.parametrize("depth", [2, 18, 21, 40])
def test_a_depth_that_is_not_6n_plus_2_raises(depth):
    with pytest.raises(ValueError, match=f"depth must be 6 n \\+ 2 .*got {depth}"):
        variables_of(models.CifarResNet(10, depth=depth))
