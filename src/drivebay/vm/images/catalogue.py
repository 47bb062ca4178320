"""The well-known cloud images: where distributions publish them, and with which checksum.

Context: a short-lived process. The list is data, vm/data/cloud_images.toml. A checksum file is
read strictly: exactly one line may speak of our file. It comes from the server of the image, so
it guards against what got lost on the way; the signatures of distributions are not verified.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final
from urllib.parse import urlsplit

from drivebay.errors import NotFound, StateError, UsageError
from drivebay.vm.images.download import check_url

__all__ = ["MIRROR_SETTING", "CloudImage", "cloud_image", "cloud_images", "find_checksum"]

# In the environment: what takes the place of https://HOST in all addresses.
MIRROR_SETTING: Final = "DRIVEBAY_IMAGE_MIRROR"

_DIGITS: Final = {"sha256": 64, "sha512": 128}


@dataclass(frozen=True)
class CloudImage:
    """One image of a distribution."""

    name: str
    os: str
    image: str  # its address
    checksums: str  # that of the file with its checksum
    kind: str  # of checksum: 'sha256' or 'sha512'
    format: str
    user: str
    cloud_init: bool | None = None

    def at(self, mirror: str | None) -> tuple[str, str]:
        """The addresses of the image and its checksums, perhaps on a mirror.

        >>> cloud_image("debian-12").at("http://10.0.0.1/cloud")[0][:36]
        'http://10.0.0.1/cloud/images/cloud/b'
        """
        if not mirror:
            return self.image, self.checksums
        check_url(mirror)
        if urlsplit(mirror).query or urlsplit(mirror).fragment:
            raise UsageError(f"the mirror '{mirror[:200]}' is no address of a folder")
        image, checksums = (mirror.rstrip("/") + urlsplit(url).path
                            for url in (self.image, self.checksums))  # fmt: skip
        return image, checksums


@cache
def cloud_images() -> dict[str, CloudImage]:
    """All of them, by name."""
    text = (resources.files("drivebay.vm") / "data" / "cloud_images.toml").read_text()
    return {name: CloudImage(name, **values) for name, values in tomllib.loads(text).items()}


def cloud_image(name: str) -> CloudImage:
    """The image of that name. Raises: NotFound."""
    try:
        return cloud_images()[name]
    except KeyError:
        raise NotFound(
            f"'{name[:80]}' is none of the images that can be pulled",
            hint=f"there are {', '.join(cloud_images())}; others: drivebay image import URL",
        ) from None


def find_checksum(text: str, file: str, kind: str) -> str:
    """What a checksum file says of one file. Raises: StateError.

    Both spellings are known: that of sha256sum, and 'SHA256 (FILE) = …' of BSD, with a
    signature around it or not.
    """
    digits, name = _DIGITS[kind], re.escape(file)
    spellings = (
        rf"([0-9a-fA-F]{{{digits}}}) [ *](?:\./)?{name}",
        rf"{kind.upper()} \({name}\) = ([0-9a-fA-F]{{{digits}}})",
    )
    found = {
        match[1].lower()
        for line in text.splitlines()
        for spelling in spellings
        if (match := re.fullmatch(spelling, line.rstrip()))
    }
    if len(found) != 1:
        what = "several checksums" if found else f"no {kind.upper()}"
        raise StateError(
            f"the list of checksums has {what} of '{file}'",
            hint="the distribution may have moved it: look there, and drivebay image import URL",
        )
    return found.pop()
