"""`export`: the dense weights * masks of a network, for other programs."""

import json
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy

from supermask_jax.commands import files, opened
from supermask_jax.commands.answers import USAGE, Answer, Failure
from supermask_jax.commands.opened import Loaded
from supermask_jax.origins import Leaves


def export(argument: str, *, to: str, output: str, base: str | None, max_bytes: int | None) -> Answer:
    """Writes a network in another format; an older file of that name is replaced.

    Args:
      argument: FILE, or FILE:NAME for one of several masks.
      to: one of `answers.FORMATS`.
      output: the path of the new file.
      base: a .safetensors or .npz file of the weights, for masks on somebody else's network.
      max_bytes: what the network may take in memory, or None.

    Raises:
      Failure: the file is damaged; the format has no place for this network; a package is missing.
      OSError: a file cannot be read or written.
    """
    file, path = opened.read(argument, max_bytes), Path(output).expanduser()
    for flag, there in (("the file itself", file.path), ("what --base names", base and Path(base).expanduser())):
        if there and path.exists() and there.exists() and path.samefile(there):
            raise Failure(f"--output {path} is {flag}: choose another path", USAGE)
    if not path.parent.is_dir():
        raise Failure(f"--output {path}: there is no directory {path.parent}", USAGE)
    loaded = opened.load(file, None if base is None else opened.base_weights(base, file))
    if to == "npz":
        paths = [_npz(path, loaded)]
    elif to == "safetensors":
        paths = [_safetensors(path, _named(loaded), loaded)]
    else:
        paths = _of_the_zoo(path, to, loaded, file.path)
    return Answer([f"{path}: {path.stat().st_size:,} bytes" for path in paths])


def _named(loaded: Loaded) -> Leaves:
    """{path: array} of the weights, and of the state with "state/" before its paths."""
    named = loaded.subnetwork()
    state = {f"state/{path}": leaf for path, leaf in loaded.state.items()}
    if taken := sorted(named.keys() & state.keys()):
        raise Failure(f"weights and state have the same names: {', '.join(taken[:5])}")
    return {name: np.ascontiguousarray(leaf).reshape(leaf.shape) for name, leaf in (named | state).items()}


def _npz(path: Path, loaded: Loaded) -> Path:
    """NumPy's own dtypes only: bfloat16 is widened to float32, which holds the same numbers."""
    with files.replacing(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, leaf in _named(loaded).items():
            own = leaf if leaf.dtype.isbuiltin == 1 else leaf.astype(np.float32)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, own, allow_pickle=False)
    return path


def _safetensors(path: Path, arrays: Leaves, loaded: Loaded) -> Path:
    with files.replacing(path) as new:
        new.write_bytes(safetensors.numpy.save(arrays, {"about": json.dumps(loaded.about)}))
    return path


def _of_the_zoo(path: Path, to: str, loaded: Loaded, file: Path) -> list[Path]:
    """The formats whose layouts depend on the network."""
    from supermask_jax.commands import graphs, networks, onnx_file, pytorch

    network = networks.build(loaded, file)
    graph = graphs.steps(network)
    arrays = graphs.arrays(graph, loaded.subnetwork(), loaded.state)
    if to == "torch":
        return [path, pytorch.write(path, network, graph, arrays)]
    if to == "onnx":
        onnx_file.write(path, network, graph, arrays)
        return [path]
    masks = graphs.arrays(graph, {layer: mask != 0 for layer, mask in loaded.masks.items()}, {})
    return [_safetensors(path, compressed(arrays, masks), loaded)]


def compressed(arrays: Leaves, masks: Leaves) -> Leaves:
    """Returns the arrays with those of two axes that have a mask in the bitmask layout of `compressed-tensors`.

    Instead of "Dense_0.weight" [rows, columns] there are "Dense_0.compressed", the kept values row by row;
    "Dense_0.bitmask" [rows, columns / 8], uint8, the first column in the lowest bit; "Dense_0.row_offsets", where each
    row begins in the values; and "Dense_0.shape". All others stay dense.

    Args:
      arrays: {name: array}.
      masks: {name: array}, not 0 where a value is kept.
    """
    found = {}
    for name, array in arrays.items():
        if name not in masks or array.ndim != 2:
            found[name] = array
            continue
        kept, layer = masks[name] != 0, name.removesuffix(".weight")
        counts = kept.sum(axis=-1)
        found[f"{layer}.shape"] = np.array(array.shape, np.int64)
        found[f"{layer}.compressed"] = array[kept]
        found[f"{layer}.bitmask"] = np.packbits(kept, axis=-1, bitorder="little")
        found[f"{layer}.row_offsets"] = np.cumsum(counts) - counts
    return found
