"""Documents: one title each, no link to a page that is not there, each RPC method described."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from drivebay.rpc.methods import all_methods
from tests.style.tree import ROOT, files, named

# [text](page.md), [text](page.md#part) and `docs/page.md`
_LINK = re.compile(
    r"\]\((?![a-z]+:)([^)#\s]+)|`((?:docs|benchmarks|packaging|tests|tools)/[\w./-]+)`"
)


def titles(text: str) -> list[str]:
    """The '# Title' lines of a document; a '#' inside a code block is not one."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^# .+$", prose, re.MULTILINE)


@pytest.mark.parametrize("path", files(".md"), ids=named)
def test_one_title_in_each_document(path: Path) -> None:
    assert len(titles(path.read_text())) == 1, f"{named(path)}: {titles(path.read_text())}"


def test_titles_are_counted() -> None:
    assert titles("# One\n```\n# not this\n```\ntext\n# Two\n") == ["# One", "# Two"]
    assert titles("text\n## Sub\n") == []


def dead_links(page: Path, text: str) -> list[str]:
    """A link counts from its page, a path in backticks from the root of the clone."""
    return [
        link or code
        for link, code in _LINK.findall(text)
        if not ((page.parent / link) if link else (ROOT / code)).exists()
    ]


@pytest.mark.parametrize("path", files(".md"), ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    assert not dead_links(path, path.read_text()), named(path)


def test_a_dead_link_is_seen() -> None:
    text = (
        "[a](no-such.md#part) [b](testing.md#rules) [c](https://x.y/z.md) `docs/none.md` `tools/`"
    )
    assert dead_links(ROOT / "docs" / "page.md", text) == ["no-such.md", "docs/none.md"]


def undocumented(methods: Iterable[str], text: str) -> list[str]:
    return [name for name in methods if f"### {name}\n" not in text]


def test_each_rpc_method_is_described() -> None:
    assert all_methods()
    assert not undocumented(all_methods(), (ROOT / "docs" / "rpc.md").read_text())


def test_an_undescribed_method_is_seen() -> None:
    assert undocumented(["bdev_get", "bdev_get_bdevs"], "### bdev_get_bdevs\n") == ["bdev_get"]
