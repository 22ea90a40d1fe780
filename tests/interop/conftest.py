"""Results of small slides with known regions, and the JavaScript client that shows them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from models.predictor import Predictor
from pipeline.checks.result import broken_rules
from pipeline.slide.recipe import segment_slide
from tests.models.networks import ColorClassifier, ColorSegmenter, make_card
from tests.pipeline.fakes import CORNER, SMALL, stating_bounds
from tests.slides import PINK, PURPLE, painted, write_slide
from wsi.readers import READERS

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

RED = (180, 40, 60)
HERE = Path(__file__).parent
UNREACHABLE = re.compile("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|network")
"""npm's messages if its registry does not answer."""
NO_REGISTRY = "npm's registry does not answer, and Vitessce is not in the cache"


@dataclass(frozen=True)
class Shown:
    """A result and what a client must show of it."""

    folder: Path
    size_l0: tuple[int, int]
    """(width, height) of the slide as QuPath sees it, cropped to its bounds."""
    mpp: float
    regions: tuple[tuple[Rectangle, int], ...]
    """(x_l0, y_l0, width, height) in QuPath's frame and the label; the later ones lie on top."""
    colors: tuple[Color, ...]
    """Colors of the classes. The slide's stains have other colors."""

    @property
    def store(self) -> Path:
        return self.folder / f"{self.folder.name}.ome.zarr"

    def label_at(self, x_l0: float, y_l0: float) -> int:
        """Return the label of a point in QuPath's frame, or 0 outside every region."""
        hits = [label for (x, y, w, h), label in self.regions if x <= x_l0 < x + w and y <= y_l0 < y + h]
        return hits[-1] if hits else 0


def segmented(path: Path, stains: Sequence[Color], colors: Sequence[Color]) -> Path:
    """Segment a slide by its stains, with classes in other colors. Return the result's folder."""
    card = make_card(colors, mpp=1.0)
    classifier, segmenter = ColorClassifier(stains), ColorSegmenter(stains, sharpness=400.0)
    predictor = Predictor(card, "0" * 64, classifier, segmenter, device="cpu")
    result = segment_slide(path, path.parent / "results", predictor, replace(SMALL, block_out=64))
    assert result.folder is not None
    assert not [text for wrong in broken_rules(result.folder).values() for text in wrong]
    return result.folder


@pytest.fixture(scope="session")
def three_classes(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Return a map of three classes with a pyramid of four levels, made from a slide of 0.5 µm/px."""
    regions = (((320, 192, 1920, 1280), 1), ((832, 512, 640, 512), 2), ((1600, 896, 384, 320), 3))
    stains, size = (PINK, PURPLE, RED), (2560, 1664)
    painting = painted(size, *((box, stains[label - 1]) for box, label in regions))
    path = write_slide(tmp_path_factory.mktemp("three") / "slide.svs", painting, mpp=0.5)
    colors = ((230, 159, 0), (0, 158, 115), (0, 114, 178))
    return Shown(segmented(path, stains, colors), size, 0.5, regions, colors)


@pytest.fixture(scope="session")
def with_bounds(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Return a map of two classes, made from a slide with bounds. QuPath crops that slide to its bounds."""
    regions = (((160, 96, 960, 640), 1), ((416, 256, 320, 256), 2))
    stains, (x, y), size = (PINK, PURPLE), CORNER, (1280, 832)
    shapes = (((left + x, top + y, w, h), stains[label - 1]) for (left, top, w, h), label in regions)
    painting = painted((size[0] + 128, size[1] + 64), *shapes)
    path = write_slide(tmp_path_factory.mktemp("bounds") / "slide.svs", painting, mpp=1.0)
    colors = ((0, 158, 115), (230, 159, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "openslide", stating_bounds(READERS["openslide"]))
        folder = segmented(path, stains, colors)
    return Shown(folder, size, 1.0, regions, colors)


@pytest.fixture(params=["three_classes", "with_bounds"])
def shown(request: pytest.FixtureRequest) -> Shown:
    """Return each of the results."""
    result: Shown = request.getfixturevalue(request.param)
    return result


@pytest.fixture(scope="session")
def vitessce() -> Path:
    """Return the folder of Vitessce's bundle for a browser. npm installs it once, into the user's cache.

    The environment variable WSI_SEGMENT_NODE names another cache.
    """
    cache = Path(os.environ.get("WSI_SEGMENT_NODE") or user_cache_path("wsi-segment") / "node")
    content = b"".join((HERE / name).read_bytes() for name in ("package.json", "package-lock.json", "vitessce.js"))
    bundle = cache / hashlib.sha256(content).hexdigest()[:16]
    if not bundle.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            _bundle(Path(work))
            (Path(work) / "bundle").replace(bundle)
    return bundle


def _bundle(work: Path) -> None:
    """Install what the lockfile pins, without running its scripts, and bundle it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm: install Node.js 18 or later, it fetches Vitessce for this test")
    for name in ("package.json", "package-lock.json", "vitessce.js"):
        shutil.copy(HERE / name, work)
    install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=60000"]
    try:
        installed = subprocess.run(install, cwd=work, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(NO_REGISTRY)
    if installed.returncode and UNREACHABLE.search(installed.stderr):
        pytest.skip(NO_REGISTRY)
    assert installed.returncode == 0, installed.stderr
    esbuild = [
        str(work / "node_modules" / ".bin" / "esbuild"),
        "vitessce.js",
        "--bundle",
        "--splitting",
        "--format=esm",
    ]
    options = ["--outdir=bundle", "--minify", '--define:process.env.NODE_ENV="production"', "--log-level=error"]
    subprocess.run([*esbuild, *options], cwd=work, check=True, timeout=120)
