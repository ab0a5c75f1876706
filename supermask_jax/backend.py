"""`jit`: `jax.jit` with the compiler options that the backend needs.

With jaxlib 0.10, plain `jax.jit` makes train steps with convolutions 3 to 6 times slower on a CPU than they can be.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.core  # eval_context
import jax.extend.core

P = ParamSpec("P")
R = TypeVar("R")

OPTIONS: Mapping[str, Mapping[str, str | int | bool]] = {
    "cpu": {  # the defaults of jaxlib 0.10 make ...
        "xla_cpu_experimental_ynn_fusion_type": "",  # ... convolutions 2 to 3 times slower
        "xla_cpu_use_fusion_emitters": False,  # ... the whole step 10 % slower
        "xla_backend_optimization_level": 1,  # ... compilation twice as long, and the step no faster
    }
}
"""{backend: {compiler option: value}}; a backend that is not named needs none."""

_UNSET: Any = object()


class Jitted(Generic[P, R]):
    """A function that is compiled when it is called, as by `jax.jit`. `jit` makes it.

    Whatever else a function compiled by `jax.jit` has (`trace`, `eval_shape`, `clear_cache`), this one has too.
    """

    def __init__(self, function: Callable[P, R], settings: Mapping[str, Any]):
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **settings)
        self._for_backend = functools.cache(lambda: _with_options(self._plain, function, settings))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._jit(*args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        """The function lowered for these arguments, or for their shapes; `.compile()` makes it executable."""
        return self._jit.lower(*args, **kwargs)

    @property
    def _jit(self) -> Any:
        # jax refuses compiler options inside another function's trace; there the outermost jit decides them.
        return self._for_backend() if _is_top_level() else self._plain

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)  # a decorated method

    def __getattr__(self, name: str) -> Any:
        if name in ("_plain", "_for_backend"):  # not made yet, as in a copy
            raise AttributeError(name)
        return getattr(self._jit, name)


def jit(
    function: Callable[P, R],
    *,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    out_shardings: Any = _UNSET,
) -> Jitted[P, R]:
    """Returns `function` compiled as by `jax.jit`, with the compiler options that the default backend needs.

    On a CPU, these options make train steps with convolutions 3 to 6 times faster than plain `jax.jit` does with
    jaxlib 0.10. On other backends there are none. The results differ from those of `jax.jit` by rounding at most.

    The backend is determined at the first call, or `.lower`; making the function starts none. Inside another function's
    trace (jit, grad, vmap, scan) the function is an ordinary nested `jax.jit`, and the options are those of the
    outermost one. An option that the compiler does not know is left out.

        @sm.jit
        def evaluate(params, images): ...

        step = sm.jit(sm.make_train_step(mask_fn, loss_fn, tx, learns="scores"), donate_argnums=0)

    Args:
      function: a pure function of pytrees.
      donate_argnums: the positions of the arguments whose memory the results may take over.
      static_argnums: the positions of the arguments that are compile-time constants.
      static_argnames: the names of the arguments that are compile-time constants.
      out_shardings: where the results lie; a tree of shardings that is a prefix of the results. Left out, the compiler
        chooses.

    Returns:
      The compiled function. It is called like `function`, and has `.lower(*args)` like one of `jax.jit`.
    """
    settings = {
        "donate_argnums": donate_argnums,
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
    }
    if out_shardings is not _UNSET:
        settings["out_shardings"] = out_shardings
    return Jitted(function, settings)


def _with_options(plain: Any, function: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    wanted = OPTIONS.get(jax.default_backend(), {})
    options = {name: value for name, value in wanted.items() if _is_known(name, value)}
    return jax.jit(function, **settings, compiler_options=options) if options else plain


@functools.cache
def _is_known(name: str, value: str | int | bool) -> bool:
    """Whether the compiler has the option; tested once in a process, by compiling nearly nothing."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def _is_top_level() -> bool:
    """Whether no transformation is tracing."""
    return jax.extend.core.get_opaque_trace_state() == _top_level()


@functools.cache
def _top_level() -> Any:
    with jax.core.eval_context():
        return jax.extend.core.get_opaque_trace_state()
