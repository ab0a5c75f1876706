"""What a program compiled for CPUs moves between devices, read from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({KINDS})(?:-start)?\(")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"(\w+)=(?:%([\w.-]+)|\{(%[^}]*)\})")
LOOPS = ("body", "condition")


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    kind: str  # "all-gather", ...
    arrays: list[int]  # elements of each array in its result, per device
    bytes: int  # of its result, per device, each time
    name: str  # the operation that it is part of, with its scopes: "jit(step)/jvp(selection)/while/body/reduce_sum"
    trips: int = 1  # how often it runs in a run of the program, where no trips depend on data
    data_loops: int = 0  # how many loops around it have a number of trips that depends on data


class _Use(NamedTuple):
    """The use of one computation by another."""

    by: str
    trips: int | None = 1  # None where they depend on data


def collectives(program: str) -> list[Collective]:
    """Every collective in the text of a compiled program, in its order.

    A loop whose number of trips the compiler knows multiplies `trips`. Every other loop adds one to `data_loops`.
    """
    computation, uses, seen = "", {}, []
    for line in program.splitlines():
        if header := HEADER.match(line):
            computation = header[1]
            continue
        if match := COLLECTIVE.match(line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for _, shape in arrays]
            moved = sum(BYTES[dtype] * size for (dtype, _), size in zip(arrays, sizes, strict=True))
            name = re.search(r'op_name="([^"]*)"', line)
            seen.append((computation, Collective(match[2], sizes, moved, name[1] if name else "")))
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        for role, one, several in CALLED.findall(line):
            for called in [one] if one else re.findall(r"%([\w.-]+)", several):
                trips = 1 if role not in LOOPS else int(known[1]) if known else None
                uses.setdefault(called, _Use(computation, trips))
    return [_in_its_loops(one, where, uses) for where, one in seen]


def _in_its_loops(one: Collective, computation: str, uses: dict[str, _Use]) -> Collective:
    while use := uses.get(computation):
        one = one._replace(
            trips=one.trips * (use.trips or 1),
            data_loops=one.data_loops + (use.trips is None),
        )
        computation = use.by
    return one


def by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """{kind: bytes of the results}, kinds in alphabetical order. Loops that depend on data are counted once."""
    sums = Counter()
    for one in collectives:
        sums[one.kind] += one.bytes * one.trips
    return dict(sorted(sums.items()))


def wire_bytes(kind: str, result: float, devices: int) -> float:
    """Bytes that a device sends in a collective over all devices, by the ring algorithms.

    Args:
      result: bytes of the collective's result, per device.

    Source: Thakur, Rabenseifner and Gropp 2005; an all-reduce is a reduce-scatter and an all-gather.
    """
    others = (devices - 1) / devices
    match kind:
        case "all-reduce":
            return 2 * others * result
        case "all-gather" | "all-to-all":
            return others * result
        case "reduce-scatter":
            return (devices - 1) * result
        case "collective-permute" | "collective-broadcast":
            return result
    raise ValueError(f"no collective {kind!r}; there are: {KINDS.replace('|', ', ')}")
