from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from tests.slides import GLASS, PINK

RUN = textwrap.dedent("""
    import ctypes
    import json
    import sys
    from pathlib import Path
    from pipeline.config import SegmentConfig, resolve
    from pipeline.workers.malloc import keep_freed_memory
    from pipeline.slide.plan import plan_slide
    from pipeline.slide.recipe import segment_slide
    from tests.pipeline.fakes import color_predictor

    path, out, trim = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
    config = SegmentConfig(block_out=256, num_workers=2, device="cpu", runtime="torch")
    keep_freed_memory()
    predictor = color_predictor()
    _, slide, tissue, plan = plan_slide(path, predictor.card, config)
    slide.close()
    peaks, kept = [], []

    def measure(*_):
        def now(field):
            # Not getrusage, which starts with the peak of the parent process.
            return int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0]) * 1024

        peaks.append(now("VmHWM"))
        if trim:
            ctypes.CDLL(None).malloc_trim(0)
        kept.append(now("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts again

    segment_slide(path, out, predictor, config, measure)
    measure()
    planned = plan.memory_bytes(resolve(config, predictor.compute))
    print(json.dumps({"blocks": len(plan.blocks), "planned": planned, "peaks": peaks, "kept": kept}))
""")


def write_large_slide(path: Path, rows: int) -> Path:
    """Write a slide 3072 pixels wide, one row of tiles at a time, so that the test itself needs little memory."""

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for y in range(rows):
            for x in range(12):
                tile_HWC = np.empty((256, 256, 3), np.uint8)
                tile_HWC[:] = PINK if 1 <= x <= 10 else GLASS
                tile_HWC[: 16 * (1 + (x + y) % 5), :64] = GLASS
                yield tile_HWC

    tifffile.imwrite(
        path,
        tiles(),
        shape=(rows * 256, 3072, 3),
        dtype=np.uint8,
        tile=(256, 256),
        photometric="rgb",
        compression="adobe_deflate",
        metadata=None,
        description="Aperio Image Library v11\r\n|MPP = 1.0",
    )
    return path


def segment_large_slide(folder: Path, *, trim: bool) -> dict[str, Any]:
    """Segment 72 blocks in a process and return its memory in bytes: the peak between two finished blocks, and what is
    in use after each. With `trim`, freed memory returns to the kernel before what is in use is measured."""
    path = write_large_slide(folder / "slide.svs", 96)
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(folder / "out"), str(trim)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    # A measurement for each finished block, and some for the steps before and after.
    assert found["blocks"] == 72 <= len(found["peaks"])
    return found


@pytest.mark.full
def test_memory_stays_below_the_plan(tmp_path: Path) -> None:
    found = segment_large_slide(tmp_path, trim=False)
    assert max(found["peaks"]) <= found["planned"]


@pytest.mark.full
def test_memory_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    kept = segment_large_slide(tmp_path, trim=True)["kept"]
    # Freed memory does not count, because what glibc keeps depends on which steps of the blocks in flight coincide.
    # The smallest of 18 measurements is one with little else in flight.
    second, last = min(kept[18:36]), min(kept[54:72])
    # 36 blocks are between the two parts, so a block that keeps 2 MB is found.
    assert last - second <= 36 * 1e6, kept
