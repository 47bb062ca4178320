"""`drivebay net host-bridge plan|apply|confirm|undo`: the host's uplink moved into a bridge.

Context: root, short-lived processes; `confirm` usually comes from another login than `apply`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from drivebay.cli.arguments import Parser, add_json_option
from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.errors import InUse, UsageError

if TYPE_CHECKING:
    from drivebay.net.hostbridge.change import Change
    from drivebay.net.hostbridge.plan import HostPlan

__all__ = ["add_parser", "run"]

DEFAULT_SECONDS: Final = 60
_LIMITS: Final = (10, 600)


def add_parser(commands: Any) -> None:
    """Add `host-bridge` and its actions to the subcommands of `drivebay net`."""
    text = "move the host's uplink into a bridge, with its addresses and routes"
    parser = commands.add_parser(
        "host-bridge",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.\n\n"
        "Unless it is confirmed in time everything is as before again, by itself.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    plan = _add(actions, "plan", "show what would be done, and do nothing")
    apply = _add(actions, "apply", "do it, and undo it by itself unless 'confirm' comes")
    for each in (plan, apply):
        each.add_argument("--bridge", default="br0", metavar="NAME", help="(default: br0)")
    apply.add_argument(
        "--seconds",
        type=int,
        default=DEFAULT_SECONDS,
        metavar="N",
        help="how long to wait for 'confirm', 10 to 600 (default: 60)",
    )
    apply.add_argument("--yes", action="store_true", help="do not ask")
    _add(actions, "confirm", "keep it, also after the next start of the host")
    _add(actions, "undo", "go back, also after 'confirm'")
    parser.set_defaults(run=run)


def _add(actions: Any, name: str, text: str) -> Parser:
    parser: Parser = actions.add_parser(name, help=text, description=text)
    parser.add_argument("uplink", metavar="IFACE", help="the uplink, such as eno1")
    add_json_option(parser)
    return parser


def run(found: argparse.Namespace) -> int:
    """Run one of the actions."""
    from drivebay.net.hostbridge.change import Change, refuse_without_root

    refuse_without_root()
    change = Change()
    message = change.take_message()
    if message is not None:
        print_warning(message)
    return _ACTIONS[found.action](change, found)


# ---- plan and apply -----------------------------------------------------------------------------


def _plan(change: Change, found: argparse.Namespace) -> int:
    from drivebay.net.hostbridge.application import all_steps
    from drivebay.net.hostbridge.kernel import Kernel
    from drivebay.net.hostbridge.plan import look

    _nothing_waits(change)
    with Kernel() as kernel:
        plan = look(kernel, found.uplink, found.bridge)
        steps = [text for text, _ in all_steps(kernel, plan.before)]
    if found.json:
        print_json({"facts": plan.facts, "would": steps, "warnings": plan.warnings})
        return DONE
    print("\n".join([*plan.facts, "steps:", *(f"  - {text}" for text in steps)]))
    _warn(plan)
    return DONE


def _apply(change: Change, found: argparse.Namespace) -> int:
    from drivebay.cli.steps import ask
    from drivebay.net.hostbridge.application import all_steps, carry_out
    from drivebay.net.hostbridge.kernel import Kernel
    from drivebay.net.hostbridge.plan import look

    low, high = _LIMITS
    if not low <= found.seconds <= high:
        raise UsageError(f"--seconds is {low} to {high}, and not {found.seconds}")
    _nothing_waits(change)
    with Kernel() as kernel, change.locked():
        plan = look(kernel, found.uplink, found.bridge)
        _warn(plan)
        if not found.yes:
            steps = [text for text, _ in all_steps(kernel, plan.before)]
            print("\n".join([*plan.facts, "steps:", *(f"  - {text}" for text in steps)]))
            ask(f"Move '{found.uplink}' into the bridge '{found.bridge}'?")
        carry_out(kernel, change, plan, found.seconds)
    command = f"drivebay net host-bridge confirm {found.uplink}"
    if found.json:
        print_json({"bridge": found.bridge, "uplink": found.uplink, "seconds": found.seconds})
        return DONE
    print(f"'{found.uplink}' is in the bridge '{found.bridge}', which has its addresses now")
    print(f"  in {found.seconds} s all is as before again, unless you type: {command}")
    print("  a new login may do that: try one")
    return DONE


def _warn(plan: HostPlan) -> None:
    for sentence in plan.warnings:
        print_warning(sentence)


def _nothing_waits(change: Change) -> None:
    """A change whose guardian is gone is taken back at once. Raises: InUse when one waits."""
    from drivebay.net.hostbridge.return_trip import take_back

    if not change.waits():
        return
    before = change.before()
    left = change.guarded()
    if left is not None:
        raise InUse(
            f"a change of '{before.uplink.name}' waits for confirmation, for {left:.0f} s more",
            hint=f"drivebay net host-bridge confirm {before.uplink.name}, or undo",
        )
    with change.locked():
        if change.waits():
            take_back(change, "it was not confirmed, and its guardian is gone")
    print_warning(change.take_message() or "")


# ---- confirm and undo ---------------------------------------------------------------------------


def _confirm(change: Change, found: argparse.Namespace) -> int:
    from drivebay.net.hostbridge.confirmation import confirm

    with change.locked():
        before = change.before()
        _check_uplink(before.uplink.name, found.uplink)
        done = confirm(change, before)
    if found.json:
        print_json({
            "bridge": before.bridge, "uplink": found.uplink, "manager": done.manager,
            "files": done.files,
        })  # fmt: skip
        return DONE
    print(f"'{found.uplink}' stays in the bridge '{before.bridge}'")
    for path in done.files:
        print(f"  written: {path}")
    if not done.files:
        print_warning(
            f"nobody that we know configures '{found.uplink}', so nothing was written: after the "
            "next start of the host it is as before, unless you write it where you wrote "
            f"'{found.uplink}': {done.wanted}"
        )
    return DONE


def _undo(change: Change, found: argparse.Namespace) -> int:
    from drivebay.net.hostbridge.return_trip import take_back, undo_confirmed

    with change.locked():
        if change.waits():
            _check_uplink(change.before().uplink.name, found.uplink)
            change.end_guardian()
            take_back(change, "undo")
            change.take_message()
        else:
            undo_confirmed(change, found.uplink)
    if found.json:
        print_json({"uplink": found.uplink, "undone": True})
    else:
        print(f"'{found.uplink}' is as it was before")
    return DONE


def _check_uplink(waiting: str, named: str) -> None:
    if waiting != named:
        raise UsageError(
            f"the change that waits is of '{waiting}', and not of '{named[:40]}'",
            hint=f"drivebay net host-bridge confirm {waiting}",
        )


_ACTIONS: Final = {"plan": _plan, "apply": _apply, "confirm": _confirm, "undo": _undo}
