from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from tests.slides import GLASS, PINK

RUN = textwrap.dedent("""
    import sys
    from pathlib import Path
    from dataclasses import replace
    from pipeline.config import SegmentConfig, resolve
    from pipeline.workers.malloc import keep_freed_memory
    from pipeline.slide.recipe import plan_slide, segment_slide
    from tests.pipeline.fakes import color_predictor

    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    config = SegmentConfig(block_out=256, num_workers=2, device="cpu", runtime="torch")
    keep_freed_memory()
    predictor = color_predictor()
    _, slide, tissue, plan = plan_slide(path, predictor.card, config)
    slide.close()
    segment_slide(path, out, predictor, config)
    # Not getrusage, which starts with the peak of the parent process.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(len(plan.blocks), plan.memory_bytes(resolve(config, predictor.compute)), peak)
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


@pytest.mark.full
def test_memory_stays_below_the_plan_and_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    peaks = []
    for rows in (12, 96):
        path = write_large_slide(tmp_path / f"slide{rows}.svs", rows)
        run = subprocess.run(
            [sys.executable, "-c", RUN, str(path), str(tmp_path / f"out{rows}")],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        assert run.returncode == 0, run.stderr
        blocks, planned, peak = map(int, run.stdout.split())
        assert blocks == 3 * rows // 4
        assert peak <= planned
        peaks.append(peak)
    # Eight times as many blocks. Only the thumbnail and the polygons grow, by a few bytes per block.
    assert peaks[1] <= 1.1 * peaks[0], peaks
