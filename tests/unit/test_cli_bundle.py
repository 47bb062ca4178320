"""What a support bundle leaves out."""

from __future__ import annotations

import doctest

import pytest

from drivebay.cli import bundle
from drivebay.cli.bundle import mask, mask_text


def test_examples_in_the_documentation() -> None:
    found = doctest.testmod(bundle)
    assert found.attempted == 2
    assert found.failed == 0


@pytest.mark.parametrize(
    "name", ["key", "key2", "psk", "secret", "msecret", "password", "dhchap_key", "AuthToken"]
)
def test_secrets_are_known_by_their_names(name: str) -> None:
    assert mask([{name: ["x"]}]) == [{name: "(left out)"}]
    assert "hush" not in mask_text(f'a {{"{name}": "hush \\" hush", "b": 1}}')
    assert "hush" not in mask_text(f"{name}=hush")
    assert "hush" not in mask_text(f"'{name}': 'hush'")


@pytest.mark.parametrize("name", ["name", "key_name", "keyring_file", "monkey", "num_blocks"])
def test_other_names_are_kept(name: str) -> None:
    assert mask({name: "x"}) == {name: "x"}
    assert mask_text(f'"{name}": "x"') == f'"{name}": "x"'


def test_a_secret_that_is_not_set_is_seen_not_to_be() -> None:
    assert mask({"psk": None}) == {"psk": None}
