"""The library's imports flow one way, and importing it starts, prints and loads nothing that it need not."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import supermask_jax as sm

PACKAGE = Path(sm.__file__).parent
ALLOWED = {
    "backend": set(),
    "names": set(),
    "leaves": {"names"},
    "densities": {"leaves"},
    "trees": {"leaves", "names"},
    "moves": set(),
    "usage": {"moves", "names", "trees"},
    "checks": {"leaves", "trees"},
    "units": {"leaves", "trees"},
    "layouts": {"densities", "leaves", "names", "trees", "usage"},
    "threshold": set(),
    "draws": set(),
    "selection": {"checks", "densities", "draws", "leaves", "threshold", "trees"},
    "initializers": {"densities", "draws", "leaves", "names", "trees"},
    "criteria": {"draws", "trees"},
    "saliency": {"checks", "criteria", "densities", "leaves", "selection", "trees", "units"},
    "lottery": {"densities", "leaves", "selection", "trees", "units"},
    "construction": {"draws", "trees"},
    "supermask": {"checks", "densities", "draws", "leaves", "selection", "trees"},
    "flops": {"trees", "usage"},
    "metrics": {"flops", "trees"},
    "train": {"leaves", "names", "supermask", "trees"},
    "parallel": {"supermask", "train", "trees"},
    "dynamic": {"densities", "leaves", "selection", "supermask", "train", "trees"},
    "codes": set(),
    "container": set(),
    "header": {"codes", "container", "draws"},
    "origins": {"codes", "draws", "header", "initializers", "leaves", "supermask", "trees"},
    "contents": {"codes", "container", "header", "origins"},
    "artifact": {"codes", "container", "contents", "header", "methods", "origins", "supermask", "trees"},
    "methods": {
        *("backend", "densities", "dynamic", "leaves", "lottery", "saliency", "selection", "supermask", "train"),
        *("trees", "units"),
    },
    "torch_files": set(),
    "pretrained": {"container", "supermask", "torch_files", "trees"},
    "graph": {"backend", "trees"},
    "channels": {"graph"},
    "products": {"channels", "graph"},
    "compaction": {"backend", "channels", "flops", "graph", "products", "trees"},
    "__main__": {"commands"},
}
COMMANDS = {  # of the rooms under commands/; each may import any room of the library
    "answers": set(),
    "files": {"answers"},
    "opened": {"answers"},
    "info": {"answers", "opened"},
    "verify": {"answers", "info", "opened"},
    "diff": {"answers", "opened"},
    "networks": {"answers", "opened"},
    "graphs": {"answers", "networks"},
    "onnx_file": {"files", "graphs", "networks"},
    "pytorch_resnet": set(),
    "pytorch": {"answers", "files", "graphs", "networks"},
    "export": {"answers", "files", "graphs", "networks", "onnx_file", "opened", "pytorch"},
    "images": {"answers", "files"},
    "classify": {"answers", "images", "networks", "opened"},
}
LIBRARIES = {"jax", "numpy", "optax", "safetensors"}  # flax too, under models/
OF_COMMANDS = {"networks": {"flax"}, "images": {"PIL"}, "pytorch_resnet": {"torch"}}  # beside LIBRARIES


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            packages = ("supermask_jax", "supermask_jax.commands")
            yield from [f"{node.module}.{a.name}" for a in node.names] if node.module in packages else [node.module]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    names = list(imports(PACKAGE / f"{room}.py"))
    assert {name.split(".")[1] for name in names if name.startswith("supermask_jax.")} <= ALLOWED[room]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, *LIBRARIES, "supermask_jax"}


def test_every_room_is_in_the_table():
    assert {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("room", COMMANDS)
def test_a_room_of_the_commands_imports_only_what_it_may(room):
    names = list(imports(PACKAGE / "commands" / f"{room}.py"))
    within = {name.split(".")[2] for name in names if name.startswith("supermask_jax.commands.")}
    assert within <= COMMANDS[room]
    allowed = {*sys.stdlib_module_names, *LIBRARIES, *OF_COMMANDS.get(room, ()), "supermask_jax"}
    assert {name.split(".")[0] for name in names} <= allowed


def test_every_room_of_the_commands_is_in_the_table():
    assert {file.stem for file in (PACKAGE / "commands").glob("*.py")} - {"__init__"} == set(COMMANDS)


def test_models_import_flax_and_nothing_of_the_rooms():
    for file in (PACKAGE / "models").glob("*.py"):
        names = list(imports(file))
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "jax", "flax", "supermask_jax"}
        assert all(n.startswith("supermask_jax.models") for n in names if n.startswith("supermask_jax")), file


def test_the_library_prints_nothing_but_on_its_command_line():
    for file in set(PACKAGE.rglob("*.py")) - {PACKAGE / "__main__.py"}:
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"], file


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_prints_nothing_and_starts_no_backend():
    fresh("import supermask_jax, jax; assert not jax._src.xla_bridge.backends_are_initialized()")


def test_flax_is_imported_with_the_models_and_not_before():
    fresh(
        "import sys, supermask_jax as sm\n"
        "assert not {'flax', 'chex'} & set(sys.modules)\n"
        "assert 'models' in dir(sm) and 'models' in sm.__all__ and 'flax' not in sys.modules\n"
        "assert sm.models.MLP and sm.models is sys.modules['supermask_jax.models'] and 'flax' in sys.modules\n"
    )
    fresh("from supermask_jax import models; from supermask_jax.models import zoo; assert models.zoo is zoo")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'supermask_jax' has no attribute 'nets'"):
        _ = sm.nets


def test_the_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


# Docstrings.


def documented():
    """{qualified name: docstring} of the public names, and of the public functions and classes of public modules."""
    names = {name: getattr(sm, name) for name in sm.__all__}
    modules = {name: value for name, value in names.items() if inspect.ismodule(value)}
    models = [importlib.import_module(f"supermask_jax.models.{f.stem}") for f in (PACKAGE / "models").glob("[a-z]*.py")]
    for module in [*modules.values(), *models]:
        members = {f"{module.__name__}.{name}": value for name, value in vars(module).items() if name[0] != "_"}
        names |= {
            name: value
            for name, value in members.items()
            if getattr(value, "__module__", "").startswith("supermask_jax")
        }
    kinds = (inspect.isfunction, inspect.isclass, inspect.ismodule)
    return {name: value for name, value in names.items() if any(is_kind(value) for is_kind in kinds)}


DOCUMENTED = documented()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_docstring_needs_no_other(name):
    text = inspect.getdoc(DOCUMENTED[name])
    assert text, name
    text = " ".join(text.split())
    assert not re.search(r"as in `|else as in|else is as|[Aa]rguments as|[Ee]rrors as|which see", text)


@pytest.mark.parametrize(
    "name",
    [name for name, value in DOCUMENTED.items() if inspect.isfunction(value) and "Args:" in (value.__doc__ or "")],
)
def test_arguments_are_described_in_the_order_of_the_signature(name):
    function = DOCUMENTED[name]
    section = re.split(r"\n\n(?! {6})", inspect.getdoc(function).split("Args:\n", 1)[1])[0]
    described = re.findall(r"^  (\w+):", section, re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)
