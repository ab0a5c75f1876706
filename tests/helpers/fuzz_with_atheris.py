"""Coverage-guided fuzzing of the reader of network files. No test: it runs for as long as it is told, with atheris.

    pip install atheris
    python tests/helpers/fuzz_with_atheris.py CORPUS -max_total_time=3600 -rss_limit_mb=4096 -timeout=60

CORPUS is an empty folder, which is filled with a file of each kind. Half of the mutations change bytes of the file,
and half the text of its header, which is compressed again. The run ends with a traceback at any exception but
ValueError and OSError, at a file that needs too much memory or time, and at one that holds another network under the
hashes of one that was saved. Another network with hashes of its own is a file that is right: the fuzzer sees what
hashes are compared with, and writes them.
"""

import random
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "library"), str(Path(__file__).parents[2])]

with atheris.instrument_imports(include=["supermask_jax", "safetensors", "json"]):
    import test_fuzz_artifact as fuzz


def refused_or_right(content: bytes) -> None:
    """The one property: an error of these two kinds, or a network that was saved."""
    try:
        found = fuzz.loaded(content)
    except (ValueError, OSError):
        return
    if found not in RIGHT and hashes(content) in HASHES:
        raise RuntimeError("a file that was mutated holds another network")


def mutate(content: bytes, most: int, seed: int) -> bytes:
    """Other bytes, or another header; content that has no header any more is mutated as it is."""
    if random.Random(seed).random() < 0.5:
        return atheris.Mutate(content, most)
    try:
        header = fuzz.zlib.decompress(header_of(content))
        return fuzz.with_header(content, atheris.Mutate(header, 2 * len(header) + 64))[:most]
    except Exception:  # of whatever the mutations before have left
        return atheris.Mutate(content, most)


def hashes(content: bytes) -> dict:
    return fuzz.unpacked(content)[2]["sha256"]


def header_of(content: bytes) -> bytes:
    index, arrays, _ = fuzz.unpacked(content)
    begin, end = index["header"]["data_offsets"]
    return arrays[begin:end]


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    corpus.mkdir(exist_ok=True)
    for kind in fuzz.KINDS:
        (corpus / kind.replace(" ", "-")).write_bytes(fuzz.file_of(kind))
    RIGHT = [fuzz.right_of(kind) for kind in fuzz.KINDS]
    HASHES = [hashes(fuzz.file_of(kind)) for kind in fuzz.KINDS]
    atheris.Setup(sys.argv, refused_or_right, custom_mutator=mutate)
    atheris.Fuzz()
