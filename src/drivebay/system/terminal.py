"""What others have said, made harmless for a terminal.

Context: any. Guests and programs write whatever they like, and a terminal obeys it.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["harmless"]

# Colours stay. All else that a terminal would obey goes: whole sequences, then what is left of
# cut ones.
_COLOUR = rb"\x1b\[[0-9;]*m"
_SEQUENCE = (
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[PX^_\]][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-Z\\`-~]"
)
_CONTROL = rb"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]"
_PATTERN: Final = re.compile(rb"(%s)|%s|%s" % (_COLOUR, _SEQUENCE, _CONTROL))


def harmless(text: bytes) -> bytes:
    r"""Return ``text`` without what would change more of a terminal than its colours.

    >>> harmless(b"\x1b[2J\x1b[31mred\x1b[0m\x1b]0;title\x07\x08!\r\n")
    b'\x1b[31mred\x1b[0m!\r\n'
    """
    return _PATTERN.sub(lambda found: found[1] or b"", text)
