"""The settings of a run: the only home of their defaults."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.runtimes import Precision, Runtime, RuntimeName, choose_runtime
from pipeline.errors import ConfigError

if TYPE_CHECKING:  # the command's --help reads the defaults here, and must not load the readers
    from wsi.slide import Backend


@dataclass(frozen=True)
class SegmentConfig:
    """How slides are segmented. Raises ConfigError on a value out of range."""

    mpp: float | None = None
    """Micrometres per level-0 pixel; None takes what the slide says."""
    backend: Backend = "auto"
    """Reader: OpenSlide, tiffslide, or OpenSlide first."""
    overlap: float = 0.25
    """Share of a tile's side that it has in common with the next tile."""
    output_stride: int = 4
    """Model pixels per pixel of the stored map: 4 is the network's own, 2 and 1 are interpolated from it."""
    min_area_um2: float = 2000.0
    """Polygons smaller than this are merged into their neighbour; 0 keeps every one. The label image is not changed."""
    simplify_px: float = 1.0
    """Tolerance of the polygons' borders, in pixels of the map; 0 keeps the pixels' own edges."""
    keep_ungated: bool = False
    """Where the gate silences every class, take the segmenter's word instead of leaving "no class"."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    precision: Precision = "float32"
    """Number format of the networks."""
    runtime: RuntimeName = "auto"
    """What computes the networks: PyTorch or OpenVINO; "auto" takes OpenVINO on a CPU where it is installed and can."""
    batch_size: int | None = None
    """Tiles per call of a network; None takes 8, on CUDA 32."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """Blocks that are read and written at the same time. Up to two more wait for the device."""
    max_bad_share: float = 0.01
    """A slide of which more tiles than this cannot be read fails."""
    block_out: int = 1024
    """Side of a block in pixels of the map: larger ones compute fewer tiles twice, smaller ones take less memory."""
    force: bool = False
    """Replace a result that is there already, whatever it was made with."""

    def __post_init__(self) -> None:
        _check(self.mpp is None or (math.isfinite(self.mpp) and self.mpp > 0), "--mpp", self.mpp, "a positive number")
        _check(0 <= self.overlap <= 0.75, "--overlap", self.overlap, "from 0 to 0.75")
        _check(self.output_stride in (1, 2, 4), "--output-stride", self.output_stride, "1, 2 or 4")
        _check(self.min_area_um2 >= 0, "--min-area", self.min_area_um2, "0 or more")
        _check(self.simplify_px >= 0, "--simplify", self.simplify_px, "0 or more")
        _check(self.block_out >= 16 and self.block_out % 16 == 0, "block_out", self.block_out, "a multiple of 16")
        _check(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        _check(self.num_workers >= 1, "--num-workers", self.num_workers, "1 or more")

    @property
    def in_flight(self) -> int:
        """How many blocks are in memory at once, at most."""
        return self.num_workers + 1

    @property
    def chosen_runtime(self) -> Runtime:
        """What "auto" stands for on this machine, whatever the model."""
        if self.runtime != "auto":
            return self.runtime
        from models.predictor import choose_device  # loads torch

        # A device that is named may be one that only a cluster's machines have.
        device = choose_device("auto").type if self.device == "auto" else self.device
        return choose_runtime("auto", device, self.precision)

    def parameters(self) -> dict[str, object]:
        """Those settings that decide what the result is: two runs with the same ones give the same result."""
        return {
            "mpp": self.mpp,
            "backend": self.backend,
            "overlap": self.overlap,
            "output_stride": self.output_stride,
            "min_area_um2": self.min_area_um2,
            "simplify_px": self.simplify_px,
            "keep_ungated": self.keep_ungated,
            "precision": self.precision,
            "runtime": self.chosen_runtime,
            "block_out": self.block_out,
        }


def _check(holds: bool, flag: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{flag} is {value}; it must be {allowed}")
