#!/usr/bin/env python3
"""Ask for each address of the cloud images that `drivebay image pull` knows (`make check-images`).

A HEAD request for each image, and the list of checksums itself, which has to name the image. It
needs internet (or http_proxy and https_proxy, or DRIVEBAY_IMAGE_MIRROR); nothing is kept.
"""

from __future__ import annotations

import os
import sys

from drivebay.errors import DrivebayError
from drivebay.vm.images.catalogue import MIRROR_SETTING, CloudImage, cloud_images, find_checksum
from drivebay.vm.images.download import check_answers, fetch_text, file_name


def problem(image: CloudImage) -> str | None:
    """What is wrong with an image's addresses, in a sentence."""
    url, checksums = image.at(os.environ.get(MIRROR_SETTING))
    try:
        check_answers(url)
        find_checksum(fetch_text(checksums), file_name(url), image.kind)
    except DrivebayError as error:
        return str(error)
    return None


def main() -> int:
    failed = 0
    for name, image in cloud_images().items():
        found = problem(image)
        failed += found is not None
        print(f"{name:<18}{found or 'is there, and so is its checksum'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
