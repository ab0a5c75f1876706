"""The command line: `python -m supermask_jax`, or `supermask`. Nothing else in the library prints."""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from supermask_jax.commands.answers import FORMATS, USAGE, WRONG, Answer, Failure

CLOSED, INTERRUPTED = 141, 130  # what a shell reports of a program that SIGPIPE or SIGINT ended


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(f"{message}. {self.prog} --help tells the usage.")
        sys.exit(USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status.

    Args:
      arguments: after the name of the program. None: those of this process, which then computes on the CPU unless
        JAX_PLATFORMS names another platform.

    Returns:
      0; 1 if the file is damaged, or differs; 2 if the command cannot be done as it was given.
    """
    options = vars(_parser().parse_args(arguments))
    if arguments is None:
        _on_the_cpu()
    try:
        answer = options.pop("command")(**options)
        for line in answer.lines:
            print(_printable(line))
        sys.stdout.flush()
        return answer.status
    except Failure as failure:
        _complain(str(failure))
        return failure.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at the end goes there
        return CLOSED
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
        return USAGE
    except MemoryError:
        _complain("there is not enough memory for this network")
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED


# Imported by the subcommand that is run alone, so that --help answers at once.


def _info(file: str, json: bool, gzip: bool, max_bytes: int | None) -> Answer:
    from supermask_jax.commands.info import info

    return info(file, as_json=json, with_gzip=gzip, max_bytes=max_bytes)


def _verify(file: str, **options: Any) -> Answer:
    from supermask_jax.commands.verify import verify

    return verify(file, **options)


def _diff(a: str, b: str, json: bool, max_bytes: int | None) -> Answer:
    from supermask_jax.commands.diff import diff

    return diff(a, b, as_json=json, max_bytes=max_bytes)


def _export(file: str, **options: Any) -> Answer:
    from supermask_jax.commands.export import export

    return export(file, **options)


def _run(file: str, **options: Any) -> Answer:
    from supermask_jax.commands.classify import run

    return run(file, **options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="supermask",
        description="Works with files of networks: frozen weights times binary masks (subnetwork.safetensors).",
        epilog="Exit status: 0, or 1 if a file is damaged or differs, or 2 if the command cannot be done as given.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(command=function)
        made.add_argument(
            "--max-bytes",
            type=_positive,
            metavar="N",
            help="memory that a network may take; the default is 4096 times the size of its file, and at least 16 MiB",
        )
        return made

    file: Any = {"metavar": "FILE", "help": "the file; FILE:NAME chooses one of several masks in it"}
    base: Any = {"metavar": "WEIGHTS", "help": "weights that the masks are on (.safetensors, .npz), if FILE lacks them"}
    json: Any = {"action": "store_true", "help": "print one JSON object"}

    info = command("info", _info, "show layers, densities, origin and size of a network")
    info.add_argument("file", **file)
    info.add_argument("--json", **json)
    info.add_argument("--gzip", action="store_true", help="draw the weights, and show their size compressed by gzip")

    verify = command("verify", _verify, "check that a file still holds the network that was saved")
    verify.add_argument("file", **file)
    verify.add_argument("--base", **base)

    diff = command("diff", _diff, "show how much the masks of two files overlap")
    diff.add_argument("a", **file | {"metavar": "A"})
    diff.add_argument("b", **file | {"metavar": "B"})
    diff.add_argument("--json", **json)

    export = command("export", _export, "write weights * masks for other programs")
    export.add_argument("file", **file)
    export.add_argument("--to", choices=FORMATS, required=True, help="the format")
    export.add_argument("--output", required=True, metavar="PATH", help="the new file; an older one is replaced")
    export.add_argument("--base", **base)

    run = command("run", _run, "classify images")
    run.add_argument("file", **file)
    run.add_argument("--images", required=True, help="a directory of .png and .jpg files, or an IDX file (.gz too)")
    run.add_argument("--labels", metavar="IDX", help="an IDX file of labels: print the accuracy too")
    run.add_argument("--top", type=_positive, default=1, metavar="K", help="classes to name for each image")
    run.add_argument("--quiet", action="store_true", help="print the accuracy alone")
    run.add_argument("--base", **base)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _printable(text: str) -> str:
    """The text with what a terminal would take as a command written out: a file can hold any text."""
    if text.isprintable() and text.isascii():
        return text
    encoding = sys.stdout.encoding or "ascii"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def _complain(message: str) -> None:
    paragraph = " ".join(_printable(message.replace("\n", " ")).split())
    print(
        textwrap.fill(f"error: {paragraph}", width=100, break_long_words=False, break_on_hyphens=False),
        file=sys.stderr,
    )


def _on_the_cpu() -> None:
    """A check or an export needs no accelerator, whose memory another process may have taken."""
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    sys.exit(main())
