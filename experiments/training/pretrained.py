"""The weights that a run begins with, from a file of PyTorch."""

import zlib
from pathlib import Path

import jax
import numpy as np

import supermask_jax as sm
from experiments.run.errors import UserError
from experiments.training.network import Network
from supermask_jax.trees import Tree, by_path


def load(file: str, net: Network) -> tuple[Tree, Tree]:
    """(weights, model_state) of a file for the network; UserError if it cannot be read, or is of another network."""
    try:
        return require_finite(sm.load_pretrained(Path(file).expanduser(), net.module))
    except OSError as error:
        raise UserError(f"--weights: cannot read {file} ({error.strerror or error}).") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--weights: {error}. Weights are those of a ResNet for ImageNet (--model resnet18 to wide-resnet50, most "
            "with --affine --biases) and as many classes as the images have."
        ) from error


def require_finite(trees: Tree) -> Tree:
    """The trees; ValueError if a number in them is NaN or infinite."""
    for path, leaf in by_path(jax.tree.map(np.asarray, trees)).items():
        if not np.isfinite(leaf).all():
            raise ValueError(f"the file has numbers that are not finite, in {path}")
    return trees


def digest(file: str) -> str:
    """The CRC-32 of a file, as eight hexadecimal digits; UserError if it cannot be read."""
    crc = 0
    try:
        with open(Path(file).expanduser(), "rb") as stream:
            while part := stream.read(2**24):
                crc = zlib.crc32(part, crc)
    except OSError as error:
        raise UserError(f"--weights: cannot read {file} ({error.strerror or error}).") from error
    return f"{crc:08x}"
