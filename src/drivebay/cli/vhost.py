"""`drivebay vhost`: run the target in this process, with the options of SPDK's vhost.

Context: the process that becomes the target, so little is imported before it
does. An option of SPDK that has no meaning here is accepted, so that a command
line which is in use goes on working, and answered with one warning.
"""

from __future__ import annotations

import argparse
import re

from drivebay.cli.arguments import Parser, parse_size
from drivebay.cli.output import REFUSED, print_error, print_warning
from drivebay.errors import DrivebayError, UsageError
from drivebay.target.options import (
    DEFAULT_RPC_SOCKET,
    Options,
    available_cores,
    check_options,
    parse_cpumask,
)

__all__ = ["DEFAULT_SOCKET_DIR", "build_parser", "main", "read_options"]

DEFAULT_SOCKET_DIR = "."

_NO_DPDK = "there is no DPDK here"
_NO_HUGEPAGES = "no hugepages are needed"
_NO_PCI = "no PCI device is touched"
_NO_TRACE = "there is no trace buffer"

# (spellings, takes a value, why it has no meaning)
_IGNORED: tuple[tuple[tuple[str, ...], bool, str], ...] = (
    (("--lcores",), True, "each reactor is pinned to the core that -m names"),
    (("--disable-cpumask-locks",), False, "cores are not locked"),
    (("--interrupt-mode",), False, "reactors always sleep when idle"),
    (("-g", "--single-file-segments"), False, _NO_HUGEPAGES),
    (("--huge-dir",), True, _NO_HUGEPAGES),
    (("-R", "--huge-unlink"), False, _NO_HUGEPAGES),
    (("--no-huge",), False, _NO_HUGEPAGES),
    (("--enforce-numa",), False, _NO_HUGEPAGES),
    (("-n", "--mem-channels"), True, _NO_DPDK),
    (("-i", "--shm-id"), True, _NO_DPDK),
    (("--iova-mode",), True, _NO_DPDK),
    (("--base-virtaddr",), True, _NO_DPDK),
    (("--env-context",), True, _NO_DPDK),
    (("--msg-mempool-size",), True, "the mailboxes are not taken from a pool"),
    (("-u", "--no-pci"), False, _NO_PCI),
    (("-A", "--pci-allowed"), True, _NO_PCI),
    (("-B", "--pci-blocked"), True, _NO_PCI),
    (("--vfio-vf-token",), True, _NO_PCI),
    (("-e", "--tpoint-group"), True, _NO_TRACE),
    (("--num-trace-entries",), True, _NO_TRACE),
    (("-d", "--limit-coredump"), False, "RLIMIT_CORE is never changed"),
)

_EPILOG = """\
SIGTERM and SIGINT end the target: sessions are closed, sockets and the pid file
removed, exit code 0. SIGHUP is ignored. These options of SPDK's vhost are accepted
and have no meaning here:
"""


def main(arguments: list[str], prog: str = "drivebay vhost") -> int:
    """Become the target; returns when it has ended."""
    found = build_parser(prog).parse_args(arguments)
    for option in dict.fromkeys(found.ignored):
        print_warning(f"option {option[0]} is ignored: {option[1]}")
    try:
        options = read_options(found)
        check_options(options)
        from drivebay.target import app

        return app.main(options)
    except DrivebayError as error:
        # The command line was well formed: what the host refuses is no usage error.
        print_error(error)
        return REFUSED


def build_parser(prog: str = "drivebay vhost") -> Parser:
    """Return the parser; `read_options` understands what it finds."""
    parser = Parser(
        prog,
        description="Serve block devices to virtual machines over vhost-user.",
        usage=f"{prog} [-S DIR] [-m MASK] [-r SOCKET] [-c FILE] [option …]",
        epilog=_EPILOG + _ignored_text(),
        add_help=False,
    )
    _add_spdk_options(parser.add_argument_group("as in SPDK's vhost"))
    _add_own_options(parser.add_argument_group("more"))
    parser.set_defaults(ignored=[])
    for spellings, takes_value, reason in _IGNORED:
        parser.add_argument(
            *spellings,
            action=_Ignore,
            nargs=None if takes_value else 0,
            const=reason,
            dest="ignored",
            help=argparse.SUPPRESS,
        )
    return parser


def read_options(found: argparse.Namespace) -> Options:
    """Turn what was typed into the target's options. Raises: UsageError."""
    if found.rpc_socket is not None and re.fullmatch(r"[^/]*:\d+", found.rpc_socket):
        raise UsageError(
            f"RPC over TCP is not offered, and '{found.rpc_socket}' is not the path of a socket",
            hint=f"-r {DEFAULT_RPC_SOCKET}",
        )
    return Options(
        socket_dir=found.socket_dir,
        cores=parse_cpumask(found.cpumask, available_cores()),
        main_core=found.main_core,
        rpc_socket=None if found.no_rpc_server else found.rpc_socket,
        rpcs_allowed=_names(found.rpcs_allowed),
        wait_for_rpc=found.wait_for_rpc,
        memory_mb=found.mem_size,
        config=found.config,
        ignore_init_errors=found.json_ignore_init_errors,
        autosave=found.autosave,
        pid_file=found.pidfile,
        log_flags=tuple(found.logflag),
        silence_notice=found.silence_noticelog,
        poll_us=found.poll_us,
        socket_mode=found.socket_mode,
        socket_group=found.socket_group,
    )


def _add_spdk_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "-S",
        dest="socket_dir",
        metavar="DIR",
        default=DEFAULT_SOCKET_DIR,
        help="folder where controllers' sockets are made (default: the working folder)",
    )
    add(
        "-m",
        "--cpumask",
        metavar="MASK",
        default="0x1",
        help="cores of the reactors: hexadecimal, or a list as [0,2-3] (default: 0x1)",
    )
    add(
        "-p",
        "--main-core",
        metavar="CORE",
        type=_count,
        help="core of the control thread (default: any that has no reactor)",
    )
    add(
        "-r",
        "--rpc-socket",
        metavar="SOCKET",
        default=DEFAULT_RPC_SOCKET,
        help=f"RPC socket (default: {DEFAULT_RPC_SOCKET})",
    )
    add(
        "-s",
        "--mem-size",
        metavar="MB",
        type=_megabytes,
        default=0,
        help="most memory that malloc bdevs may take together (default: no bound)",
    )
    add(
        "-c",
        "--config",
        "--json",
        metavar="FILE",
        help="configuration to replay at start, as save_config writes it",
    )
    add(
        "--json-ignore-init-errors",
        action="store_true",
        help="go on when an entry of that file fails",
    )
    add(
        "--wait-for-rpc",
        action="store_true",
        help="wait for framework_start_init before anything is set up",
    )
    add("--rpcs-allowed", metavar="LIST", help="the only RPC methods to answer, with commas")
    add("--no-rpc-server", action="store_true", help="open no RPC socket")
    add("-f", "--pidfile", metavar="FILE", help="write the process id to a file")
    add(
        "-L",
        "--logflag",
        metavar="FLAG",
        action="append",
        default=[],
        help="show the details of one part; may be repeated ('all' is every part)",
    )
    add("--silence-noticelog", action="store_true", help="log warnings and errors only")
    add("-h", "--help", action="help", help="show this text")
    add("-v", "--version", action=_Version, nargs=0, help="show the version")


def _add_own_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--poll-us",
        metavar="N",
        type=_poll_us,
        help="longest time a reactor polls after its last work; -1 for ever (default: adaptive)",
    )
    add("--autosave", action="store_true", help="write the -c FILE after every change")
    add(
        "--socket-mode",
        metavar="MODE",
        type=_mode,
        help="permissions of controllers' sockets, octal, such as 0660 (default: 0600)",
    )
    add(
        "--socket-group",
        metavar="GROUP",
        help="group of controllers' sockets (default: the process's own)",
    )


class _Ignore(argparse.Action):
    """Collect an option that has no meaning here, for the warning."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        namespace.ignored = [*namespace.ignored, (option_string, self.const)]


class _Version(argparse.Action):
    """Print the version and end."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from drivebay.cli.version import version_line

        print(version_line())
        parser.exit()


def _ignored_text() -> str:
    lines = [""]
    for spellings, _, _ in _IGNORED:
        word = "/".join(spellings)
        if len(lines[-1]) + len(word) > 84:
            lines.append("")
        lines[-1] += f"  {word}"
    return "\n".join(lines)


def _names(text: str | None) -> frozenset[str] | None:
    if text is None:
        return None
    return frozenset(name for part in text.split(",") if (name := part.strip()))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0")
    return int(text)


def _megabytes(text: str) -> int:
    """A plain number is MiB, as SPDK has it; with a unit it is a size."""
    if text.isascii() and text.isdigit():
        return int(text)
    return parse_size(text) >> 20


def _poll_us(text: str) -> int:
    if not re.fullmatch(r"-1|\d{1,7}", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of microseconds below 10 s, nor -1 for ever"
        )
    return int(text)


def _mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"'{text}' is not a mode: write it in octal, as 0660")
    return int(text, 8)
