"""Write models/shipped.py: the digest of the card of each shipped model bundle.

    python -m tests.shipped_models [--check]

Run it after a bundle in models/weights/ was trained again. `--check` writes nothing and exits with status 1 if the file
is not what this command writes.
"""

from __future__ import annotations

import sys

from models.bundle import SHIPPED_FOLDER, card_digest, shipped_bundles
from tests.repository import REPOSITORY

FILE = REPOSITORY / "models" / "shipped.py"

HEAD = '''"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
'''
TAIL = '''}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
'''


def text() -> str:
    """Return the text of models/shipped.py."""
    lines = [f'    "{name}": "{card_digest(SHIPPED_FOLDER / name)}",\n' for name in shipped_bundles()]
    return HEAD + "".join(lines) + TAIL


def main() -> None:
    """Write the file, or compare it."""
    if "--check" not in sys.argv:
        FILE.write_text(text(), encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != text():
        sys.exit("models/shipped.py is out of date; run python -m tests.shipped_models")


if __name__ == "__main__":
    main()
