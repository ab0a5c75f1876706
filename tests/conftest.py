"""What every test runs under: warnings are errors, and arrays of different rank never combine by accident."""

import contextlib
import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from compiling import QUICK

DATA_DIR = os.environ.get("SUPERMASK_DATA_DIR")  # read once, before any test hides it


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    gc.set_threshold(20_000, 10, 10)  # tracing makes many small objects: by default, looking through them all takes 7 %
    jax.config.update("jax_numpy_rank_promotion", "raise")
    with pytest.MonkeyPatch.context() as patch:  # this process alone: those that tests start are as users start them
        patch.setenv("XLA_FLAGS", f"{QUICK} {os.environ.get('XLA_FLAGS', '')}")
        jax.devices()  # reads it
    # What this process compiles is kept for its next tests: many compile the same step again. A directory of its own,
    # because the cache has no locks.
    config.compiled = tempfile.mkdtemp(prefix="compiled-")
    jax.config.update("jax_compilation_cache_dir", config.compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_collection_modifyitems(config, items):
    if jax.config.jax_enable_x64:
        for item in items:
            if item.get_closest_marker("float32"):
                item.add_marker(pytest.mark.skip(reason="its arrays are float32 by default"))


def pytest_unconfigure(config):
    shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What processes of their own compile is kept for the next ones: that is most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:  # too late for this process, which has imported jax
        own = tmp_path_factory.getbasetemp()  # of one of several processes of this session, or of the session
        session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(session / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_stays_compiled():
    """What a file of tests compiled is given back: a process that runs them all would grow to 5 GB, and so to 1.6."""
    yield
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # of glibc: freed memory goes back to the system
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="module")
def quick_processes():
    """What processes of their own compile is compiled as here, for tests of a whole run and not of what it computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", QUICK)
        yield


@pytest.fixture(scope="module")
def coarse_pictures():
    """Pictures of few dots, for tests that do not look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.plots.style.DOTS_PER_INCH", 30)
        yield


@pytest.fixture
def full_precision():
    """Products in the full precision of float32: those of fewer bits, a GPU's default, flip masks."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def strict_dtypes():
    """No implicit change of dtype inside the test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def data_dir() -> Path:
    """The directory named by SUPERMASK_DATA_DIR; skips the test where it holds no MNIST."""
    if not DATA_DIR:
        pytest.skip("SUPERMASK_DATA_DIR is not set: no MNIST to test on")
    root = Path(DATA_DIR).expanduser()
    # IDX files, compressed or not, in the folder or in its mnist/; or what tensorflow-datasets has prepared
    patterns = ("train-images?idx3-ubyte*", "mnist/train-images?idx3-ubyte*", "mnist/*/dataset_info.json")
    if not any(any(root.glob(pattern)) for pattern in patterns):
        pytest.skip("SUPERMASK_DATA_DIR names a directory that holds no MNIST")
    return root
