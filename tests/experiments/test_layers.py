"""The experiments' imports flow one way: from the commands, at the top, down to `run`; `LAYERS` has the order."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
LAYERS = [
    {"command"},
    {"sweeps", "tickets", "tasks", "bench", "faults", "reports"},
    {"training"},
    {"data", "plots"},
    {"config"},
    {"run"},
]
LAYERS += [{"supermask_jax"}]  # which knows of no experiment: a table of its own says so
LONGEST = 60  # lines of a function

# What a layer imports from elsewhere, beside the standard library. The others are free to.
LIBRARIES = {
    "command": {"rich", "tyro"},
    "config": {"docstring_parser", "tyro"},
    "plots": {"numpy", "matplotlib"},
    "data": {"numpy", "jax", "PIL", "absl", "grain", "requests", "scipy", "tensorflow_datasets"},
    "run": {"numpy", "jax", "msgspec", "orbax", "rich"},
    "training": {"numpy", "jax", "flax", "optax"},
    "tickets": {"numpy", "jax", "optax", "rich"},
    "tasks": {"numpy", "jax", "optax", "rich"},
    "sweeps": {"numpy", "jax", "optax", "rich"},
    "reports": set(),
    "faults": {"numpy", "jax", "orbax"},
    "bench": {"PIL", "numpy", "jax", "flax", "optax", "orbax", "rich", "torch", "onnxruntime", "sparselab"},
}

# Imports inside functions: {file: {function: what}}. A command's `main` imports what it needs, so that --help answers
# at once; these are the only others.
LATE = {
    # Rooms of data must stay light: most commands read one set, and need none of what another one takes.
    "data/augment.py": {
        **{name: {"jax", "jax.numpy"} for name in ("random_shift", "random_flip", "random_cutout")},
        **{name: {"jax.numpy"} for name in ("flip_where", "normalise")},
    },
    "data/batches.py": {name: {"jax"} for name in ("epoch_order", "alternate_flips", "class_sample")},
    "data/pictures.py": {"_pillow": {"PIL"}},
    "data/photographs.py": {"cropped": {"PIL"}},
    "data/imagenet.py": {"_flat": {"scipy.io"}},
    "data/records.py": {
        "_builder": {"tensorflow_datasets"},
        "_open": {"tensorflow_datasets", "tensorflow_datasets.proto"},
    },
    "data/stream.py": {"batches_ahead": {"absl", "grain"}},
    "data/svhn.py": {"_read_file": {"scipy.io"}},
    "data/tfds.py": "any",
    # A process that draws nothing starts sooner without matplotlib.
    "plots/style.py": {"new_figure": {"matplotlib.figure"}},
    "plots/one_run.py": {"flips": {"matplotlib"}},
    "training/fit.py": {"draw": {"experiments.plots.one_run"}},
    # Errors are reported without JAX, and one process needs nothing that several need.
    "run/command_line.py": {"_run": {"experiments.run.processes"}},
    "run/processes.py": {
        "tree_of_first": {"jax.experimental"},
        "_gathered": {"jax.experimental"},
    },
    "bench/reading.py": {"_pixels": {"PIL"}},
    # PyTorch and the other libraries are not among the requirements.
    "bench/operations.py": {"_theirs": {"experiments.bench.torch_reference"}},
    "bench/torch_steps.py": "any",
    "bench/runtimes.py": "any",
}

# Everything that is trained or evaluated is compiled by supermask_jax.jit; these have no convolution in them.
PLAIN_JIT = {"run/placement.py": 1, "training/fit.py": 1, "training/stepper.py": 1}

FILES = sorted(file.relative_to(EXPERIMENTS).as_posix() for file in EXPERIMENTS.rglob("*.py"))
ROOMS = [file for file in FILES if not file.endswith("__init__.py")]
COMMANDS = [file for file in ROOMS if "/" not in file]


@functools.cache
def tree(file):
    return ast.parse((EXPERIMENTS / file).read_text())


def layer(module):
    """The layer of experiments.x or supermask_jax.x; None of other libraries."""
    package, _, rest = module.partition(".")
    if package == "supermask_jax":
        return package
    if package != "experiments":
        return None
    folder = rest.partition(".")[0]
    return folder if (EXPERIMENTS / folder).is_dir() else "command"


def layer_of(file):
    return file.partition("/")[0] if "/" in file else "command"


def rank(name):
    return next(at for at, names in enumerate(LAYERS) if name in names)


def modules_of(node):
    """The modules that an import names: of `from package import room`, the room."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert node.level == 0, "relative imports are not used"
    inside = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if is_module(name) else node.module for name in inside}


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return name.partition(".")[0] in ("experiments", "supermask_jax") and (
        path.with_suffix(".py").is_file() or path.is_dir()
    )


def imports(file):
    """(module, the innermost function that imports it or None, whether it is for type checkers only)."""

    def visit(node, function, typing):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from ((module, function, typing) for module in modules_of(child))
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            guarded = isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"
            yield from visit(child, inner, typing or guarded)

    yield from visit(tree(file), None, False)


def test_every_folder_is_a_layer():
    folders = {path.name for path in EXPERIMENTS.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders == {name for names in LAYERS for name in names} - {"command", "supermask_jax"}


@pytest.mark.parametrize("file", ROOMS)
def test_a_room_imports_its_own_layer_and_those_to_its_right(file):
    own = layer_of(file)
    for module, _, _ in imports(file):
        other = layer(module)
        if other is None:
            continue
        assert other == own != "command" or rank(other) > rank(own), f"{file} imports {module}"


@pytest.mark.parametrize("file", ROOMS)
def test_a_room_imports_only_the_libraries_of_its_layer(file):
    allowed = {*sys.stdlib_module_names, "experiments", "supermask_jax", *LIBRARIES[layer_of(file)]}
    assert {module.partition(".")[0] for module, _, typing in imports(file) if not typing} <= allowed


def test_the_settings_know_of_nothing_but_errors():
    for file in ROOMS:
        if layer_of(file) == "config":
            others = {m for m, *_ in imports(file) if layer(m) not in (None, "config")}
            assert others <= {"experiments.run.errors"}, file


def test_plots_see_dictionaries_and_arrays_only():
    for file in ROOMS:
        if layer_of(file) == "plots":
            assert {layer(module) for module, *_ in imports(file)} <= {None, "plots", "run"}, file


def test_no_import_comes_round_to_itself():
    """Imports inside functions count as well: they would only hide it."""
    names = {f"experiments.{file[:-3].replace('/', '.')}": file for file in ROOMS}
    graph = {
        name: {module for module, _, typing in imports(file) if module in names and not typing}
        for name, file in names.items()
    }
    done = set()

    def walk(name, path):
        assert name not in path, " > ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    assert len(done) == len(ROOMS) > 40 and sum(map(len, graph.values())) > 100


@pytest.mark.parametrize("file", ROOMS)
def test_imports_inside_functions_are_those_of_the_list(file):
    late = {}
    for module, function, _ in imports(file):
        if function is not None and not (layer_of(file) == "command" and function == "main"):
            late.setdefault(function, set()).add(module)
    allowed = LATE.get(file, {})
    if allowed == "any":
        assert late, f"{file} has none any more: take it off the list"
        return
    assert late == allowed


@pytest.mark.parametrize("file", ROOMS)
def test_no_function_is_too_long_to_be_read_at_once(file):
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > LONGEST
    }
    assert not long


@pytest.mark.parametrize("file", COMMANDS)
def test_everything_at_the_top_is_a_command(file):
    body = tree(file).body
    assert "main" in {node.name for node in body if isinstance(node, ast.FunctionDef)}
    last = body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    assert not [node for node in body[:-1] if isinstance(node, ast.If | ast.Expr) and node is not body[0]]


def test_commands_import_nothing_heavy_before_their_flags_are_parsed():
    heavy = ("jax", "numpy", "matplotlib", "flax", "optax", "orbax", "supermask_jax", "tensorflow_datasets")
    code = "import sys\n"
    for file in COMMANDS:
        code += f"import experiments.{file[:-3]}\n"
        code += f"print(*('{file}: ' + name for name in {heavy} if sys.modules.pop(name, None)), end='')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_what_is_trained_or_evaluated_is_compiled_with_the_options_of_the_backend():
    plain = {}
    for file in ROOMS:
        if layer_of(file) != "bench":  # which compares the two
            calls = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)]
            count = sum(ast.unparse(node) == "jax.jit" for node in calls)
            plain |= {file: count} if count else {}
    assert plain == PLAIN_JIT
