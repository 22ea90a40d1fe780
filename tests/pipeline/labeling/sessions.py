"""Sessions of the command wsi-label, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.repository import REPOSITORY


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start wsi-label without a browser."""
    command = [sys.executable, "-m", "pipeline.cli.label", *map(str, arguments), "--no-browser"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ask(url: str, path: str, body: Any = None) -> Any:
    """Return the server's answer. A body is posted, as the page does it."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Origin": url.rstrip("/"), "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:
        return json.load(answer)
