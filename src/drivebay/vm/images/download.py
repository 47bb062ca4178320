"""A file from the web: the whole of it, the right one, and going on where it broke off.

Context: a short-lived process. What has come lies in CACHE/drivebay/downloads as KEY.part with
what the server said of it in KEY.json; the next run, even after this one was killed, asks for
the rest and only if the file is still the same (RFC 9110, 13.1.5 If-Range and 14 Range).
Servers may answer anything: lengths, ranges and redirections are checked.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from drivebay.disks.places import free_bytes
from drivebay.disks.sizes import format_size
from drivebay.errors import InUse, StateError, UsageError
from drivebay.vm.images.importing import check_file
from drivebay.vm.images.store import Report, host_errors, quiet
from drivebay.vm.places import cache_dir

__all__ = [
    "check_answers",
    "check_url",
    "clean_url",
    "downloaded",
    "fetch_text",
    "file_name",
    "is_url",
]

_SILENCE_S: Final = 60.0
_TRIES: Final = 5
_PIECE: Final = 1 << 18
_PROGRESS_BYTES: Final = 1 << 20  # a try that brought that much was no failure
_LENGTH_MOST: Final = 1 << 40
_TEXT_MOST: Final = 1 << 20
_KEPT: Final = "%/?:@!$&'()*+,;=~"  # letters of addresses that mean something there
_KEPT_S: Final = 7 * 24 * 3600

Pause = Callable[[float], None]


# ---- addresses ----------------------------------------------------------------------------------


def is_url(text: str) -> bool:
    """Whether somebody means an address and no file."""
    return "://" in text


def check_url(url: str) -> None:
    """Raises: UsageError for what can't be fetched."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError as error:
        raise UsageError(f"'{_printable(url)}' is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"'{_printable(url)}' can't be fetched: an address begins with https://HOST/ or "
            "http://HOST/",
            hint="a file on this machine is named by its path, or as file:///PATH",
        )
    if not parts.netloc.isascii() or re.search(r"[\x00-\x20\x7f]", url):
        raise UsageError(f"'{_printable(url)}' is no address: it has a letter that none may have")


def clean_url(url: str) -> str:
    """An address that may be shown and kept: without credentials, which a query may hold, too.

    >>> clean_url("https://me:secret@example.org/a.qcow2?token=1#x")
    'https://example.org/a.qcow2'
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return _printable(urlunsplit((parts.scheme, host, parts.path, "", "")))


def file_name(url: str) -> str:
    """The last part of an address's path."""
    return unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:500])


# ---- one request --------------------------------------------------------------------------------


class _Broken(Exception):
    """A connection ended before it should: another try may help."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server elsewhere, but never from https to where anybody could read along."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        check_url(newurl)
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise StateError(
                f"'{clean_url(req.full_url)}' leads from https to http ('{clean_url(newurl)}'), "
                "where the file could be exchanged",
                hint="if that is meant, name the second address itself, with --sha256",
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _open(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    """Send one request, through the proxy of http_proxy, https_proxy and no_proxy.

    Returns the answer, whatever its status. Raises: UsageError, StateError, _Broken.
    """
    check_url(url)
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    path, query = quote(parts.path or "/", safe=_KEPT), quote(parts.query, safe=_KEPT)
    request = urllib.request.Request(
        urlunsplit((parts.scheme, host, path, query, "")),
        headers={"User-Agent": "drivebay", "Accept-Encoding": "identity", **(headers or {})},
        method=method,
    )
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        # Not for where the server sends us.
        request.add_unredirected_header(
            "Authorization", "Basic " + base64.b64encode(pair.encode()).decode()
        )
    opener = urllib.request.OpenerDirector()
    try:
        for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(),
                        urllib.request.HTTPSHandler(), _Redirects(),
                        urllib.request.HTTPDefaultErrorHandler(),
                        urllib.request.HTTPErrorProcessor()):  # fmt: skip
            opener.add_handler(handler)
        return opener.open(request, timeout=_SILENCE_S)
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            raise StateError(
                f"'{clean_url(url)}' leads in a circle, or to what is no web address"
            ) from error
        return error
    except urllib.error.URLError as error:
        if isinstance(error.reason, str):
            raise _no_proxy_there(error) from error
        raise _Broken(_spell(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_spell(error)) from error
    except ValueError as error:
        raise _no_proxy_there(error) from error


def _no_proxy_there(error: Exception) -> UsageError:
    return UsageError(
        f"what http_proxy or https_proxy name is no proxy: {error}", hint="write http://HOST:PORT"
    )


def _refuse_status(url: str, status: int, reason: str) -> None:
    if status in (200, 206):
        return
    if status >= 500 or status in (408, 429):
        raise _Broken(f"the server answers {status} {_printable(reason)}")
    hint = None
    if status in (401, 403, 407):
        hint = "does it want a name and password? https://NAME:PASSWORD@HOST/…"
    elif status in (404, 410):
        hint = "look whether the address is right"
    raise StateError(
        f"the server has no '{clean_url(url)}' for us: {status} {_printable(reason)}", hint=hint
    )


def check_answers(url: str) -> None:
    """Ask whether a file is there, without fetching it. Raises: StateError, UsageError."""
    try:
        with _open(url, method="HEAD") as answer:
            _refuse_status(url, answer.status, answer.reason)
    except _Broken as error:
        raise _unreachable(url, error) from error


def fetch_text(url: str, pause: Pause = time.sleep) -> str:
    """A short text. Raises: StateError, UsageError."""
    for attempt in range(_TRIES):
        try:
            with _open(url) as answer:
                _refuse_status(url, answer.status, answer.reason)
                content: bytes = answer.read(_TEXT_MOST + 1)
                if answer.length:
                    raise _Broken("it ends early")
        except (_Broken, OSError, http.client.HTTPException) as error:
            if attempt == _TRIES - 1 or _is_final(error):
                raise _unreachable(url, error) from error
            pause(2.0**attempt)
            continue
        if len(content) > _TEXT_MOST:
            raise StateError(f"'{clean_url(url)}' is no list of checksums: it is too long")
        return content.decode(errors="replace")
    raise AssertionError


def _is_final(error: BaseException) -> bool:
    """A name that nobody knows, a port where nobody listens, a wrong certificate stay so."""
    cause = error.__cause__
    reason = getattr(cause, "reason", cause)
    return isinstance(reason, OSError) and not isinstance(
        reason, TimeoutError | ConnectionResetError | BrokenPipeError
    )


def _spell(error: BaseException) -> str:
    """What the operating system or a library says, without its number."""
    said = error.strerror if isinstance(error, OSError) else None
    return _printable(said or str(error) or type(error).__name__)


def _unreachable(url: str, error: BaseException) -> StateError:
    hint = "is the network there? a proxy is taken from http_proxy and https_proxy"
    if "CERTIFICATE" in str(error):
        hint = "apt install ca-certificates, or name a file of certificates in SSL_CERT_FILE"
    return StateError(f"can't fetch '{clean_url(url)}': {_spell(error)}", hint=hint)


# ---- a file -------------------------------------------------------------------------------------


@dataclass
class _Said:
    """What the server said of the file of which we have a part."""

    validator: str | None = None  # for If-Range: a strong ETag, or else Last-Modified
    total: int | None = None


class _Part:
    """What has come of a file."""

    def __init__(self, url: str) -> None:
        folder = cache_dir() / "downloads"
        folder.mkdir(exist_ok=True)
        _sweep(folder)
        key = hashlib.sha256(url.encode()).hexdigest()[:32]
        self.path = folder / f"{key}.part"
        self._notes = folder / f"{key}.json"
        self.said = self._read()

    def _read(self) -> _Said:
        try:
            found = json.loads(self._notes.read_text())
            said = _Said(found["validator"], found["total"])
        except (OSError, ValueError, KeyError, TypeError):
            return _Said()
        good = isinstance(said.validator, str) and type(said.total) in (int, type(None))
        return said if good else _Said()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def start(self, said: _Said) -> None:
        """Begin anew."""
        self.remove()
        self.said = said
        if said.validator is not None:
            self._notes.write_text(json.dumps(asdict(said)))

    def remove(self) -> None:
        self._notes.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.said = _Said()


def _sweep(folder: Path) -> None:
    """Nobody comes back for these."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _KEPT_S:
                path.unlink()


@contextlib.contextmanager
def downloaded(
    url: str, expected: str | None = None, report: Report = quiet, pause: Pause = time.sleep
) -> Iterator[Path]:
    """Fetch a file for the block; ``expected`` is its SHA-256 or SHA-512.

    After the block it is gone; when the block fails it stays for the next try. Raises: UsageError,
    StateError, HostError, InUse.
    """
    check_url(url)
    with host_errors("can't use the folder of downloads", cache_dir()):
        part = _Part(url)
        lock = os.open(part.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"somebody is fetching '{clean_url(url)}' already") from None
        _fetch(url, part, expected is not None, report, pause)
        if expected is not None:
            try:
                check_file(part.path, clean_url(url), expected, report)
            except StateError:
                part.remove()
                raise
        yield part.path
        part.remove()
    finally:
        os.close(lock)


def _fetch(url: str, part: _Part, verified: bool, report: Report, pause: Pause) -> None:
    """Try until the file is whole. Raises: StateError, saying how far it came; HostError."""
    failed = 0
    while True:
        before = part.size
        try:
            if _fetch_more(url, part, verified, report):
                return
            continue
        except _Broken as error:
            gained = part.size - before
            failed = 1 if gained >= _PROGRESS_BYTES and part.said.validator else failed + 1
            if _is_final(error) and part.size == 0:
                raise _unreachable(url, error) from error
            if failed == _TRIES:
                raise _broke_off(url, part, error) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                part.remove()
            with host_errors(f"can't keep what comes of '{clean_url(url)}'", part.path):
                raise
        pause(2.0 ** (failed - 1))


def _broke_off(url: str, part: _Part, error: BaseException) -> StateError:
    if part.size == 0:
        return _unreachable(url, error)
    of = f" of {format_size(part.said.total)}" if part.said.total is not None else ""
    goes_on = part.said.validator is not None
    return StateError(
        f"'{clean_url(url)}' broke off {_TRIES} times ({_spell(error)}): "
        f"{format_size(part.size)}{of} came",
        hint="run the command again: it goes on there"
        if goes_on
        else "run the command again: it begins anew, since this server can't go on",
    )


def _fetch_more(url: str, part: _Part, verified: bool, report: Report) -> bool:
    """One request for what is missing; False: it has to be asked for from the beginning.

    Raises: _Broken when the end did not come.
    """
    start = part.size if part.said.validator is not None else 0
    headers = {}
    if start:
        headers = {"Range": f"bytes={start}-", "If-Range": str(part.said.validator)}
    with _open(url, headers) as answer:
        if start and answer.status == 416:
            whole: bool = answer.headers.get("Content-Range") == f"bytes */{start}"
            if not whole:
                part.remove()
            return whole
        _refuse_status(url, answer.status, answer.reason)
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise StateError(f"the server sends '{clean_url(url)}' packed, which nobody asked for")
        if answer.status == 206:
            if not _goes_on(answer, start, part.said.total):
                part.remove()
                if not start:
                    raise StateError(f"the server sends a part of '{clean_url(url)}', not all")
                return False
        else:
            start = 0
            part.start(_Said(_validator(answer.headers), answer.length))
        _check_length(url, answer, start, verified, part.path)
        _receive(answer, part, clean_url(url), report)
    if part.said.total is not None and part.size != part.said.total:
        raise _Broken("the connection ended early")
    return True


def _goes_on(answer: Any, start: int, total: int | None) -> bool:
    """Whether a 206 is what we asked for, to the end."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
    if match is None or start == 0:
        return False
    first, last, whole = map(int, match.groups())
    return first == start and last + 1 == whole and total in (None, whole)


def _validator(headers: Message) -> str | None:
    etag = headers.get("ETag")
    if etag is not None and re.fullmatch(r'"[\x21\x23-\x7e]*"', etag):
        return str(etag)
    modified = headers.get("Last-Modified")
    return str(modified) if modified is not None and modified.isprintable() else None


def _check_length(url: str, answer: Any, start: int, verified: bool, path: Path) -> None:
    if answer.length is None:
        if not (answer.chunked or verified):
            raise StateError(
                f"the server doesn't say how long '{clean_url(url)}' is: if it broke off, nobody "
                "would see",
                hint="add --sha256 with its checksum",
            )
        return
    free = free_bytes(path.parent)
    if start + answer.length > _LENGTH_MOST or answer.length > free:
        raise StateError(
            f"'{clean_url(url)}' is {format_size(start + answer.length)} long, and for downloads "
            f"{format_size(free)} are left: '{path.parent}'",
            hint="make room there, or set XDG_CACHE_HOME to a larger place",
        )


def _receive(answer: Any, part: _Part, shown: str, report: Report) -> None:
    """Append what comes: never more than was announced, nor than anything is long."""
    with part.path.open("ab") as file:
        done = file.tell()
        while piece := _next_piece(answer, file):
            file.write(piece)
            done += len(piece)
            if done > _LENGTH_MOST:
                raise StateError(f"'{shown}' has no end: {format_size(done)} came")
            if part.said.total:
                report(f"fetching {file_name(shown)}", done, part.said.total)


def _next_piece(answer: Any, file: IO[bytes]) -> bytes:
    """What comes next; empty at the end. Raises: _Broken."""
    try:
        found: bytes = answer.read(_PIECE)
    except http.client.IncompleteRead as error:  # of chunks
        file.write(error.partial)
        raise _Broken("the connection ended early") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_spell(error)) from error
    return found
