"""What a compiled program moves between devices, read from its text."""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


class Collective(NamedTuple):
    kind: str  # "all-gather", ...
    arrays: list[int]  # elements of each array in its result, per device
    bytes: int  # of its result, per device
    name: (
        str  # the operation that asked for it, with its named scopes: "jit(step)/jvp(selection)/while/body/reduce_sum"
    )


def collectives(program: str) -> list[Collective]:
    """Every collective in the text of a compiled program; one inside a loop counts once."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({KINDS})(?:-start)?\(", line)
        if match:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for _, shape in arrays]
            moved = sum(BYTES[dtype] * size for (dtype, _), size in zip(arrays, sizes, strict=True))
            name = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match[2], sizes, moved, name[1] if name else ""))
    return found
