"""A network as an ONNX file."""

from pathlib import Path
from typing import Any

import numpy as np

from supermask_jax.commands import files
from supermask_jax.commands.graphs import EPSILON, INPUT, OUTPUT, Step, torch_name
from supermask_jax.commands.networks import Network
from supermask_jax.origins import Leaves

OPSET, IR_VERSION = 17, 8  # old enough for every runtime in use


def write(path: Path, network: Network, graph: list[Step], arrays: Leaves) -> None:
    """Writes the network as ONNX: "images" [n, c, h, w], normalised, to "logits" [n, classes].

    The metadata of the file hold the mean and the std that images are normalised by.

    Args:
      path: of the file.
      network: what is written.
      graph: its steps.
      arrays: {name: array} in PyTorch's names and layouts.

    Raises:
      Failure: onnx is not installed.
      OSError: the file cannot be written.
    """
    onnx = files.module("onnx", "--to onnx")
    helper, h, w, c = onnx.helper, *network.image_shape
    constants = dict(arrays)
    nodes = []
    for step in graph:
        inputs = list(step.inputs)
        if step.kind == "pad":  # every stride-th pixel first
            picked = f"{step.output}:picked"
            stride = {"kernel_shape": [1, 1], "strides": [step.numbers["stride"]] * 2}
            nodes.append(helper.make_node("MaxPool", inputs, [picked], picked, **stride))
            inputs = [picked]
        operation, more, attributes = _operation(step, constants)
        nodes.append(helper.make_node(operation, [*inputs, *more], [step.output], step.output, **attributes))
    images = helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["n", c, h, w])
    logits = helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["n", network.classes])
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "subnetwork", [images], [logits], initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, {"mean": str(list(network.mean)), "std": str(list(network.std))})
    onnx.checker.check_model(model, full_check=True)
    with files.replacing(path) as new:
        new.write_bytes(model.SerializeToString())


def _operation(step: Step, constants: Leaves) -> tuple[str, list[str], dict[str, Any]]:
    """(the ONNX operation, its inputs after those of the step, its attributes); further constants are added."""
    numbers, name = step.numbers, torch_name(step.layer)

    def constant(suffix: str, value: np.ndarray) -> str:
        constants[f"{step.output}:{suffix}"] = value
        return f"{step.output}:{suffix}"

    match step.kind:
        case "conv":
            attributes = {"strides": [numbers["stride"]] * 2, "pads": [numbers["padding"]] * 4}
            return "Conv", [f"{name}.weight"], attributes
        case "dense":
            bias = [f"{name}.bias"] if f"{name}.bias" in constants else []
            return "Gemm", [f"{name}.weight", *bias], {"transB": 1}
        case "pool":
            window, stride, padding = (numbers[key] for key in ("window", "stride", "padding"))
            attributes = {"kernel_shape": [window] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
            return "MaxPool", [], attributes
        case "norm":
            channels = constants[f"{name}.running_mean"].shape
            affine = [f"{name}.weight", f"{name}.bias"]
            if affine[0] not in constants:
                ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
                affine = [constant("scale", ones), constant("bias", zeros)]
            inputs = [*affine, f"{name}.running_mean", f"{name}.running_var"]
            return "BatchNormalization", inputs, {"epsilon": EPSILON}
        case "pad":
            return "Pad", [constant("pads", np.array([0, 0, 0, 0, 0, numbers["channels"], 0, 0]))], {}
        case "mean":
            return "ReduceMean", [], {"axes": [2, 3], "keepdims": 0}
        case kind:
            return {"relu": "Relu", "flatten": "Flatten", "add": "Add"}[kind], [], {}
