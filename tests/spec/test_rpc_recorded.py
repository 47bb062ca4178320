"""What SPDK's vhost answered, asked of our target: tests/data/spdk_answers.json in its order.

Real target processes get every call; each call is a test of its own. Where an answer differs,
tests/spec/differences.py must say so, and why; ``error.data`` is ours and not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.process import TargetProcess
from tests.fakes.rpc_client import exchange
from tests.spec.differences import RULES
from tests.spec.recording import Difference, Rule, Translation, load_calls
from tests.spec.replay import RUNS, folder_of_runs, replay

CALLS = load_calls()


@pytest.fixture(scope="module")
def differences() -> dict[int, list[Difference]]:
    """All runs, and in what each answer differs."""
    found: dict[int, list[Difference]] = {}
    with folder_of_runs() as folder:
        translation = Translation(str(folder))
        for run in RUNS:
            found |= replay(run, CALLS, translation)
    return found


def rules_for(call: dict[str, Any], difference: Difference) -> list[Rule]:
    return [rule for rule in RULES if rule.covers(call["n"], call["call"], difference)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call['n']}-{call['call']}")
def test_recorded_call(call: dict[str, Any], differences: dict[int, list[Difference]]) -> None:
    wrong = [
        str(difference) for difference in differences[call["n"]] if not rules_for(call, difference)
    ]
    assert wrong == []


def test_no_rule_outlives_its_reason(differences: dict[int, list[Difference]]) -> None:
    used = [
        rule
        for call in CALLS
        for difference in differences[call["n"]]
        for rule in rules_for(call, difference)
    ]
    assert [rule for rule in RULES if not any(rule is known for known in used)] == []


@pytest.fixture(scope="module")
def target() -> Iterator[TargetProcess]:
    with folder_of_runs() as folder:
        process = TargetProcess(folder)
        yield process
        assert process.stop() == 0


def test_answers_are_lines_of_compact_json(target: TargetProcess) -> None:
    request = b'{"jsonrpc":"2.0","id":"abc","method":"log_get_print_level"}'
    answer = exchange(target.rpc_path, request)
    assert answer == '{"jsonrpc":"2.0","id":"abc","result":"INFO"}\n'


def test_the_socket_is_private(target: TargetProcess) -> None:
    assert target.rpc_path.stat().st_mode & 0o777 == 0o600
