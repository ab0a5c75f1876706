"""`verify`: whether a file still holds the network that was saved."""

from supermask_jax.commands import opened
from supermask_jax.commands.answers import USAGE, Answer, Failure
from supermask_jax.commands.info import told_origin


def verify(argument: str, *, base: str | None, max_bytes: int | None) -> Answer:
    """Returns what was checked: masks, weights and state have the hashes that they had when they were saved.

    Weights of frozen networks are drawn again for it.

    Args:
      argument: FILE, or FILE:NAME for one of several masks.
      base: a .safetensors or .npz file of the weights, for masks on somebody else's network.
      max_bytes: what the network may take in memory, or None.

    Raises:
      Failure: the file is damaged; it needs base weights, and there are none, or others.
      OSError: a file cannot be read.
    """
    file = opened.read(argument, max_bytes)
    header = file.header
    if base is not None and header["origin"]["kind"] != "base":
        raise Failure(f"--base has no use: {file.path} itself tells its weights", USAGE)
    weights = None if base is None else opened.base_weights(base, file)
    names = list(file.held.masks) if file.name is None else [file.name]
    opened.load(file._replace(name=names[0]), weights)
    hashes = header["sha256"]
    lines = ["header: its checksum and its entries are right"]
    for name in names:
        masks = file.held.masks[name]
        lines.append(f"masks {name!r}: {len(masks)} layers, sha256 {hashes['masks'][name]}")
    lines.append(f"{told_origin(header['origin'])}: {len(header['leaves'])} leaves, sha256 {hashes['weights']}")
    if header["state"]:
        lines.append(f"state of the model: {len(file.held.state)} arrays, sha256 {hashes['state']}")
    return Answer([*lines, f"{file.path} is right: it holds the network that was saved"])
