"""A disk on a web server: an image that guests read without copying it first."""

from __future__ import annotations

import errno
import urllib.request

from drivebay.bdev.python_disk import PythonDisk


class HttpDisk(PythonDisk):
    threads = 8

    def __init__(self, url: str) -> None:
        self.url = url
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.num_blocks = int(answer.headers["Content-Length"]) // self.block_size

    def read(self, offset: int, length: int) -> bytes:
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        request = urllib.request.Request(self.url, headers=wanted)
        with urllib.request.urlopen(request, timeout=30) as answer:
            if answer.status != 206:
                raise OSError(errno.EOPNOTSUPP, "the server sends whole files only")
            data: bytes = answer.read()
        return data
