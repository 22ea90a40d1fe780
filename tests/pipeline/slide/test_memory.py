from __future__ import annotations

import json
import os
import statistics
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
    import json
    import sys
    from pathlib import Path
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
    peaks = []

    def peak_since_last_call(*_):
        # Not getrusage, which starts with the peak of the parent process.
        status = Path("/proc/self/status").read_text()
        peaks.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts again

    segment_slide(path, out, predictor, config, peak_since_last_call)
    peak_since_last_call()
    planned = plan.memory_bytes(resolve(config, predictor.compute))
    print(json.dumps({"blocks": len(plan.blocks), "planned": planned, "peaks": peaks}))
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
def test_memory_stays_below_the_plan_and_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    path = write_large_slide(tmp_path / "slide.svs", 96)
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(tmp_path / "out")],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    peaks = found["peaks"]
    # A peak for each finished block, and some for the steps before and after.
    assert found["blocks"] == 72 <= len(peaks)
    assert max(peaks) <= found["planned"]
    # The allocator has grown after a quarter of the blocks. A block that keeps 2 MB would be found: 36 blocks are
    # between the middles of the two parts. The peaks of two runs are not compared: the largest one depends on which
    # steps of the blocks in flight coincide, and a run of more blocks has more of these cases.
    second, last = (statistics.median(peaks[len(peaks) * part // 4 : len(peaks) * (part + 1) // 4]) for part in (1, 3))
    assert last - second <= 36 * 2e6, peaks
