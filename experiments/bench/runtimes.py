"""Inference by other libraries, for the benchmark to compare with; it runs in a process of its own (`child`).

Neither is among the requirements: what is not installed is left out. ONNX Runtime runs the masked network as a dense
one, from the file that `supermask export --to onnx` writes; sparselab multiplies by sparse matrices in PyTorch.
"""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Sequence

import numpy as np


def installed() -> dict[str, str]:
    """{name: version} of those that are installed."""
    needs = {"onnxruntime": ("onnxruntime", "onnx"), "sparselab": ("sparselab", "torch")}
    found = [name for name, modules in needs.items() if all(map(importlib.util.find_spec, modules))]
    return {name: importlib.metadata.version(name) for name in found}


def make_calls(
    file: bytes | None, matrices: Sequence[np.ndarray] | None, images: np.ndarray, threads: int
) -> dict[str, Callable[[int], np.ndarray]]:
    """{name: run}, where run(times) classifies the images so many times and returns their logits.

    Args:
      file: the network as ONNX, or None.
      matrices: its kernels [in, out] where it has dense layers only, with ReLU between them, or None. Images of several
        channels are not in the order that the first of them takes.
      images: float32 [n, c, h, w], normalised.
      threads: that each of them may use.
    """
    calls = {}
    if file is not None:
        calls["onnxruntime"] = _repeated(_onnxruntime(file, images, threads))
    if matrices is not None:
        calls["sparselab"] = _repeated(_sparselab(matrices, images, threads))
    return calls


def _repeated(run: Callable[[], np.ndarray]) -> Callable[[int], np.ndarray]:
    def repeated(times: int) -> np.ndarray:
        for _ in range(times):
            logits = run()
        return logits

    return repeated


def _onnxruntime(file: bytes, images: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads wait busily within a call, and not after it, when another candidate has its turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {"images": np.ascontiguousarray(images)}
    return lambda: session.run(None, given)[0]


def _sparselab(matrices: Sequence[np.ndarray], images: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    import sparselab
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)  # torch's, of what sparselab uses
    sparse = [sparselab.PaddedCSR.from_dense(torch.tensor(matrix.T.copy())) for matrix in matrices]
    inputs = torch.tensor(images.reshape(len(images), -1).T.copy())  # [inputs, n], as its product takes them

    def run() -> np.ndarray:
        x = inputs
        for matrix in sparse[:-1]:
            x = sparselab.spmm(matrix, x).relu()
        return sparselab.spmm(sparse[-1], x).T.numpy()

    return run
