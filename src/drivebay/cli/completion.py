"""`drivebay completion SHELL`: a script that completes commands and options.

The scripts hold no list of their own: they ask `drivebay completion words …`,
which reads the same table and parsers as the commands do.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Sequence

from drivebay.cli.arguments import Parser
from drivebay.cli.output import DONE
from drivebay.errors import DrivebayError

__all__ = ["build_parser", "candidates", "main"]

_BASH = """\
# Put this into ~/.bashrc:  source <(drivebay completion bash)
_drivebay() {
    COMPREPLY=($(drivebay completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -o bashdefault -F _drivebay drivebay
"""

_ZSH = """\
# Put this into ~/.zshrc, after compinit:  source <(drivebay completion zsh)
_drivebay() {
    local -a found
    found=(${(f)"$(drivebay completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -- $found; else _files; fi
}
compdef _drivebay drivebay
"""

_FISH = """\
# Put this into ~/.config/fish/completions/drivebay.fish:  drivebay completion fish
complete -c drivebay -a \
'(drivebay completion words -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
"""

# Subcommands whose first word is the name of something that is there.
_NAMED = {
    "pool": ("info", "grow", "delete"),
    "disk": ("info", "resize", "snapshot", "revert", "clone", "limit", "delete"),
    "image": ("info", "check", "convert", "resize", "delete", "pull"),
    "vm": (
        *("set", "start", "stop", "restart", "info", "attach", "detach", "clone", "delete", "log"),
        *("console", "ssh", "ssh-config", "exec", "wait", "qemu-command", "libvirt-xml"),
        "autostart",
    ),
}

# A person waits at the keyboard.
_PATIENCE_S = 1.0

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def main(arguments: list[str]) -> int:
    """Print a script, or (for the scripts) the words that may come next."""
    if arguments[:2] == ["words", "--"]:
        for word in candidates(arguments[2:] or [""]):
            print(word)
        return DONE
    found = build_parser().parse_args(arguments)
    print(_SCRIPTS[found.shell], end="")
    return DONE


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        "drivebay completion",
        description="Print a script that completes commands and options in your shell.",
    )
    parser.add_argument("shell", choices=list(_SCRIPTS), help="the shell it is for")
    return parser


def candidates(words: Sequence[str]) -> list[str]:
    """Return what may stand for the last of ``words``, the others being complete.

    >>> candidates(["vh"])
    ['vhost']
    """
    from drivebay.cli.main import COMMANDS

    *before, prefix = words
    if not before:
        return _starting(prefix, [*COMMANDS, "--help", "--version"])
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    if before == ["rpc"] and not prefix.startswith("-"):
        return _starting(prefix, _methods())
    parser: argparse.ArgumentParser = importlib.import_module(command.module).build_parser()
    for word in before[1:]:
        parser = _subparsers(parser).get(word, parser)
    words_found = list(_words_of(parser, prefix))
    if len(before) == 2 and before[1] in _NAMED.get(before[0], ()) and not prefix.startswith("-"):
        words_found += _images(before[1]) if before[0] == "image" else _names(before[0])
    return _starting(prefix, words_found)


def _methods() -> list[str]:
    """What the running target answers; without one, only what needs no method."""
    from drivebay.disks.connection import call, connect

    own = ["save_config", "load_config"]
    try:
        with connect(None, timeout_s=_PATIENCE_S) as client:
            return [*call(client, "rpc_get_methods", {"current": True}), *own]
    except DrivebayError:
        return own


def _names(group: str) -> list[str]:
    """The running target's pools, or disks with their snapshots; or the VMs."""
    if group == "vm":
        from drivebay.vm.store import Vms

        return Vms().names()
    from drivebay.disks.connection import connect
    from drivebay.disks.inventory import read_inventory

    try:
        with connect(None, timeout_s=_PATIENCE_S) as client:
            inventory = read_inventory(client)
    except DrivebayError:
        return []
    if group == "pool":
        return [pool.name for pool in inventory.pools]
    snapshots = [volume.name for volume in inventory.volumes if volume.snapshot]
    return [*(disk.name for disk in inventory.disks), *snapshots]


def _images(subcommand: str) -> list[str]:
    """The images that are there, or those that can be pulled."""
    from drivebay.vm.images.catalogue import cloud_images
    from drivebay.vm.images.store import Images

    return list(cloud_images()) if subcommand == "pull" else Images().names()


def _words_of(parser: argparse.ArgumentParser, prefix: str) -> Iterable[str]:
    # argparse has no public way to list what a parser holds; completion libraries read the same.
    for action in parser._actions:
        if prefix.startswith("-"):
            if action.help != argparse.SUPPRESS:
                yield from action.option_strings
        elif not action.option_strings and action.choices is not None:
            yield from (str(choice) for choice in action.choices)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _starting(prefix: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(prefix)]
