"""`sm.jit` is `jax.jit` with options: the same results, the same cache, and no backend before the first call."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import backend

X = jnp.arange(6.0).reshape(2, 3)


def counted(function, **settings):
    """(the function under sm.jit, the list that each of its traces appends to)."""
    traces = []

    def traced(*args, **kwargs):
        traces.append(1)
        return function(*args, **kwargs)

    return sm.jit(traced, **settings), traces


def convolved(images, kernel):
    out = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(jax.nn.relu(out) ** 2)


def test_the_result_is_that_of_plain_jit_and_its_gradient_too():
    images = jax.random.normal(jax.random.key(0), (4, 12, 12, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 8))
    for function in (convolved, jax.grad(convolved, argnums=1)):
        np.testing.assert_allclose(sm.jit(function)(images, kernel), jax.jit(function)(images, kernel), rtol=1e-5)


def test_a_second_call_traces_nothing_and_another_shape_once_more():
    double, traces = counted(lambda x: 2 * x)
    for _ in range(3):
        np.testing.assert_array_equal(double(X), 2 * X)
    assert len(traces) == 1 and double._cache_size() == 1
    double(X[0])
    assert len(traces) == 2


def known_options():
    """Those of the backend that this version of jax knows."""
    options = backend.OPTIONS[jax.default_backend()].items()
    return {name: value for name, value in options if backend._is_known(name, value)}


def test_the_function_is_compiled_with_the_options_of_the_backend(monkeypatch):
    seen, plain = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **settings: (seen.append(settings), plain(f, **settings))[1])
    assert sm.jit(lambda x: x + 1)(jnp.float32(1)) == 2
    assert len(known_options()) >= 2 and seen[-1]["compiler_options"] == known_options()


def test_a_compiler_that_does_not_know_an_option_compiles_without_it(monkeypatch):
    options = {"xla_no_such_thing": 1, "xla_backend_optimization_level": 1}
    monkeypatch.setattr(backend, "OPTIONS", {jax.default_backend(): options})
    seen, plain = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **settings: (seen.append(settings), plain(f, **settings))[1])
    double, traces = counted(lambda x: 2 * x)
    np.testing.assert_array_equal(double(X), 2 * X)
    assert seen[-1]["compiler_options"] == {"xla_backend_optimization_level": 1} and len(traces) == 1


def test_options_are_looked_up_once_in_a_process(monkeypatch):
    name = "xla_no_such_thing_either"
    assert not backend._is_known(name, 1)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled again"))
    assert not backend._is_known(name, 1)


def test_an_option_of_a_wrong_value_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid"):
        backend._is_known("xla_backend_optimization_level", "perhaps")


def test_a_backend_without_options_is_plain_jit(monkeypatch):
    monkeypatch.setattr(backend, "OPTIONS", {})
    double, traces = counted(lambda x: 2 * x)
    np.testing.assert_array_equal(double(X), 2 * X)
    assert len(traces) == 1


def test_donated_arguments_are_gone():
    add = sm.jit(lambda x, y: x + y, donate_argnums=0)
    given = X + 0
    np.testing.assert_array_equal(add(given, X), 2 * X)
    assert given.is_deleted() and not X.is_deleted()


def test_static_arguments_by_position_and_by_name():
    def tiled(x, times, axis=0):
        return jnp.concatenate([x] * times, axis)

    by_both = sm.jit(tiled, static_argnums=1, static_argnames="axis")
    assert by_both(X, 2).shape == (4, 3)
    assert by_both(X, 3, axis=1).shape == (2, 9)


def test_out_shardings_are_passed_on():
    sharding = jax.sharding.NamedSharding(sm.parallel.mesh(1), jax.sharding.PartitionSpec(sm.parallel.AXIS))
    assert sm.jit(lambda x: x + 1, out_shardings=sharding)(X).sharding == sharding
    assert sm.jit(lambda x: x + 1)(X).sharding != sharding


TRANSFORMED = {
    "jit": lambda f: jax.jit(f)(X),
    "sm.jit": lambda f: sm.jit(lambda x: f(x) + 0)(X),
    "grad": lambda f: jax.grad(lambda x: f(x).sum() / 2)(X) * X,
    "jvp": lambda f: jax.jvp(f, (X,), (X,))[1] / 2,
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum() / 2))(X) * X,
    "vmap": lambda f: jax.vmap(f)(X),
    "scan": lambda f: jax.lax.scan(lambda carry, x: (carry, f(x)), 0.0, X)[1],
    "constant": lambda f: jax.jit(lambda: f(np.asarray(X)))(),  # no argument is traced, and still it is nested
    "checkpoint": lambda f: jax.checkpoint(f)(X),
    "jaxpr": lambda f: jax.core.eval_jaxpr((j := jax.make_jaxpr(f)(X)).jaxpr, j.consts, X)[0],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_it_works_inside_other_transformations_and_after_them(name):
    square = sm.jit(lambda x: x**2)
    np.testing.assert_allclose(TRANSFORMED[name](square), X**2)
    np.testing.assert_allclose(square(X), X**2)
    np.testing.assert_allclose(TRANSFORMED[name](square), X**2)


def test_lower_compiles_for_shapes_with_the_options(monkeypatch):
    seen, plain = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **settings: (seen.append(settings), plain(f, **settings))[1])
    lowered = sm.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((2, 3), jnp.float32))
    np.testing.assert_array_equal(lowered.compile()(X), 2 * X)
    assert seen[-1]["compiler_options"] == known_options()


def test_it_decorates_functions_and_methods():
    @sm.jit
    def halved(x):
        """Half of x."""
        return x / 2

    class Scaled:
        @sm.jit
        def double(x):
            return 2 * x

        @functools.partial(sm.jit, static_argnums=0)
        def times_three(self, x):
            return 3 * x

    assert (halved.__name__, halved.__doc__) == ("halved", "Half of x.")
    np.testing.assert_array_equal(halved(X), X / 2)
    np.testing.assert_array_equal(Scaled.double(X), 2 * X)
    np.testing.assert_array_equal(Scaled().times_three(X), 3 * X)


def test_a_jitted_train_step_with_donation_compiles_once():
    import optax

    weights = {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}
    tx = optax.sgd(0.1, 0.9)

    def loss_fn(params, model_state, batch, key):
        return jnp.mean((batch @ params["kernel"]) ** 2), (model_state, {})

    subnet = sm.Subnet(weights, sm.init_scores(jax.random.key(1), weights))
    state = sm.init_state(subnet, tx, jax.random.key(2), learns="scores")
    step = sm.jit(sm.make_train_step(sm.edge_popup(0.3), loss_fn, tx, learns="scores"), donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, jnp.ones((5, 4)))
    assert step._cache_size() == 1 and int(state.step) == 3


def test_importing_and_wrapping_start_no_backend():
    code = (
        "import jax, supermask_jax as sm; f = sm.jit(lambda x: x + 1)\n"
        "assert not jax._src.xla_bridge.backends_are_initialized(); assert f(1) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
