"""How every command reads its arguments: one parser class, and the types of values.

argparse rather than a third-party library, because it is quick: the parser of
a command is there in 20 ms, where a library that draws coloured help took the
whole 0.2 s that `drivebay --help` may take (measured: 0.17 to 0.22 s). It also
reads the spellings of SPDK's own options as they are, so the command line has
one kind of help, one kind of error and no run-time dependency.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from drivebay.disks.sizes import read_size
from drivebay.errors import UsageError

__all__ = ["Parser", "add_json_option", "add_socket_option", "parse_seconds", "parse_size"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: a sentence, a hint, exit code 2.

    Shortened options are refused: what a script writes today must not change
    its meaning when an option is added.
    """

    def __init__(
        self, prog: str | None = None, description: str | None = None, **settings: object
    ) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, description=description, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UsageError(message, hint=f"see '{self.prog} --help'")


def parse_size(text: str) -> int:
    """Read a size, as the type of an argument. Raises: argparse.ArgumentTypeError."""
    try:
        return read_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_seconds(text: str) -> float:
    """Read a time limit, as the type of an argument. Raises: UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise UsageError(f"'{text[:40]}' is no number of seconds from 0 to 86400")
    return value


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``: the result as JSON instead of text."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_socket_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--socket``: which running target to talk to."""
    parser.add_argument(
        "-s",
        "--socket",
        metavar="PATH",
        help="the target's RPC socket (default: the target that 'drivebay target start' "
        "started, else /var/tmp/spdk.sock)",
    )
