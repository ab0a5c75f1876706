"""Imports flow one way, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "densities": set(),
    "trees": set(),
    "threshold": set(),
    "selection": {"densities", "threshold", "trees"},
    "initializers": {"densities", "trees"},
    "rounds": {"densities", "selection", "trees"},
    "saliency": {"rounds", "trees"},
    "lottery": {"densities", "trees", "selection"},
    "construction": {"initializers", "trees"},
    "supermask": {"densities", "trees", "selection", "initializers"},
    "products": {"trees"},
    "metrics": {"products", "trees"},
    "train": {"supermask", "trees"},
    "parallel": {"supermask", "train", "trees"},
    "dynamic": {"densities", "trees", "selection", "supermask", "train"},
}
BANNED = {"argparse", "tyro", "logging", "rich", "matplotlib", "orbax", "tensorflow_datasets", "experiments"}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [node.module] if node.module != "supermask_jax" else [f"supermask_jax.{a.name}" for a in node.names]
            )


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    own = {
        name.split(".")[1]
        for name in imports(ROOT / "supermask_jax" / f"{room}.py")
        if name.startswith("supermask_jax.")
    }
    assert own <= ALLOWED[room]


def test_every_room_is_in_the_table():
    rooms = {file.stem for file in (ROOT / "supermask_jax").glob("*.py")} - {"__init__"}
    assert rooms == set(ALLOWED)


def test_the_library_imports_no_front_end():
    for file in (ROOT / "supermask_jax").rglob("*.py"):
        assert not BANNED & {name.split(".")[0] for name in imports(file)}, file
        assert "print(" not in file.read_text(), file


def fresh(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_importing_prints_nothing_and_starts_no_backend():
    done = fresh("import supermask_jax, jax; assert not jax._src.xla_bridge.backends_are_initialized()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_imports_nothing_heavy_before_its_flags_are_parsed():
    code = (
        "import sys, experiments.mnist; print([m for m in ('jax', 'numpy', 'matplotlib', 'flax') if m in sys.modules])"
    )
    assert fresh(code).stdout.strip() == "[]"


def test_public_names_are_there_and_documented():
    import supermask_jax as sm

    for name in set(sm.__all__) - {"MaskFn"}:  # an alias; its comment stands beside it
        assert getattr(sm, name).__doc__, name
