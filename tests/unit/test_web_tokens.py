"""web/tokens.py: what opens the door, how often and how long."""

from __future__ import annotations

import hmac

import pytest

from drivebay.web.tokens import TOKEN_SECONDS, Sessions, Tokens


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_token_works_once_and_for_what_it_was_made() -> None:
    made = Tokens()
    first, second = made.issue("web"), made.issue("db")
    assert first != second
    assert made.redeem(second) == "db"
    assert made.redeem(second) is None
    assert made.redeem(first) == "web"


def test_a_token_works_for_five_minutes() -> None:
    clock = Clock()
    made = Tokens(clock)
    young, old = made.issue("web"), made.issue("web")
    clock.now += TOKEN_SECONDS - 0.1
    assert made.redeem(young) == "web"
    clock.now += 0.1
    assert made.redeem(old) is None


@pytest.mark.parametrize("word", ["", "x", "\udcff", "ü", "x" * 10**6])
def test_what_is_no_token_opens_nothing(word: str) -> None:
    made = Tokens()
    made.issue("web")
    assert made.redeem(word) is None
    assert not Sessions().knows(word, "web")


def test_of_too_many_tokens_the_oldest_work_no_more() -> None:
    made = Tokens()
    issued = [made.issue("web") for _ in range(20)]
    assert [made.redeem(token) for token in issued] == [None] * 4 + ["web"] * 16


def test_a_secret_works_again_and_again_but_only_there() -> None:
    opened = Sessions()
    secret = opened.open("web")
    assert opened.knows(secret, "web")
    assert opened.knows(secret, "web")
    assert not opened.knows(secret, "db")
    assert not opened.knows(secret[:-1], "web")


def test_of_too_many_secrets_the_oldest_work_no_more() -> None:
    opened = Sessions()
    secrets = [opened.open("web") for _ in range(65)]
    assert [opened.knows(secret, "web") for secret in secrets] == [False] + [True] * 64


def test_all_that_are_kept_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    made = Tokens()
    first = made.issue("web")
    made.issue("web")
    assert made.redeem(first) == "web"
    assert len(compared) == 2
