"""AES-XTS as OpenSSL does it for whoever asks, for comparison. Context: tests.

Called through ctypes, block by block and always out of place; never imports drivebay.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import cache


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(ctypes.util.find_library("crypto") or "libcrypto.so.3")
    for name in ("EVP_CIPHER_CTX_new", "EVP_aes_128_xts", "EVP_aes_256_xts"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


def encrypt(key: bytes, first: int, data: bytes, block_size: int) -> bytes:
    """Blocks with the numbers ``first``, ``first`` + 1 …; ``key`` is both halves."""
    library = _library()
    cipher = library.EVP_aes_128_xts() if len(key) == 32 else library.EVP_aes_256_xts()
    context = ctypes.c_void_p(library.EVP_CIPHER_CTX_new())
    out = bytearray()
    for at in range(0, len(data), block_size):
        tweak = (first + at // block_size).to_bytes(16, "little")
        made = ctypes.create_string_buffer(block_size)
        length = ctypes.c_int()
        assert library.EVP_EncryptInit_ex(context, ctypes.c_void_p(cipher), None, key, tweak) == 1
        block = data[at : at + block_size]
        assert (
            library.EVP_EncryptUpdate(context, made, ctypes.byref(length), block, len(block)) == 1
        )
        out += made.raw[: length.value]
    library.EVP_CIPHER_CTX_free(context)
    return bytes(out)
