"""The outputs of a segmented slide: one entry of `OUTPUTS` for each.

To add an output, write its writer in a file of this folder and add its entry here. The recipe calls every entry.
The files appear in the result, in `run.json` and on the slide's page. The page and `run.json` themselves are not
entries: they describe the other files and are written last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.formats.familiarity import FamiliarityMap, write_familiarity
from pipeline.formats.features import measure_features, read_features, write_features
from pipeline.formats.left_out import write_left_out
from pipeline.formats.ome_zarr import MapStore, build_pyramid
from pipeline.formats.polygons import Region
from pipeline.formats.preview import write_preview
from pipeline.formats.slide_picture import SlidePicture, picture_slide
from pipeline.results.areas import class_areas
from pipeline.results.names import (
    BLOCKS,
    FAMILIARITY,
    GEOJSON_END,
    GEOPARQUET_END,
    LEFT_OUT,
    LISTING,
    MAP_END,
    PREVIEW,
    RUN,
)
from wsi.grid import Grid
from wsi.slide import Slide
from wsi.tissue import Tissue


@dataclass(frozen=True)
class SegmentedSlide:
    """A slide whose blocks are all in the map: what the outputs are made from."""

    slide: Slide
    tissue: Tissue
    grid: Grid
    store: MapStore
    """The map. Level 0 is complete; the entry "pyramid" adds the coarser levels."""
    digest: str
    """`slide_digest` of the slide."""
    regions: Callable[[], Iterable[Region]]
    """Return the regions of the whole map. Every call reads and joins them again."""
    familiarity: FamiliarityMap | None = None
    """None if the model has no statistics of its training data."""
    warning: str = ""
    """What the preview states above the slide."""

    @property
    def name(self) -> str:
        """Return the slide's name without the extension, and of the result's folder."""
        return self.store.spec.name

    @property
    def size_l0(self) -> tuple[int, int]:
        """Return (width, height) of the slide's bounds in level-0 pixels."""
        bounds_l0 = self.slide.info.bounds_l0
        return bounds_l0.width, bounds_l0.height

    @functools.cached_property
    def measured(self) -> tuple[int, dict[str, float]]:
        """Return the number of regions, and the area of every class in mm². Needs the polygons."""
        return measure_features(self._polygons, self.store.spec.classes)

    @functools.cached_property
    def picture(self) -> SlidePicture:
        """Return the slide and its classes at the size of a page. Needs the polygons."""
        spec = self.store.spec
        features = read_features(self._polygons, spec.classes)
        return picture_slide(self.slide, self.tissue, self.grid, spec, features, self.familiarity)

    @property
    def _polygons(self) -> Path:
        return self.store.path.with_name(f"{self.name}{GEOPARQUET_END}")


@dataclass(frozen=True)
class Output:
    """One kind of output. Its key in `OUTPUTS` is the name of its stage in the `seconds` of `run.json`."""

    progress: str
    """What the progress shows while the output is written."""
    files: Mapping[str, str]
    """What the slide's page states about each file, by the end of the file's name."""
    write: Callable[[SegmentedSlide, Path], None]
    """Write the files into the folder."""
    beside: bool = False
    """Whether another thread writes the output while this one writes the others. Set it only for an output that needs
    nothing but the map, and that no other output needs."""


def _write_polygons(segmented: SegmentedSlide, folder: Path) -> None:
    write_features(
        folder / f"{segmented.name}{GEOJSON_END}",
        folder / f"{segmented.name}{GEOPARQUET_END}",
        segmented.regions(),
        segmented.store.spec.classes,
        l0_per_out=segmented.grid.l0_per_out,
        size_l0=segmented.size_l0,
        mpp_l0=segmented.slide.info.mpp,
        slide_digest=segmented.digest,
    )


def _write_left_out(segmented: SegmentedSlide, folder: Path) -> None:
    write_left_out(folder / LEFT_OUT, segmented.tissue, segmented.size_l0, segmented.slide.info.mpp, segmented.digest)


def _write_pyramid(segmented: SegmentedSlide, _: Path) -> None:
    build_pyramid(segmented.store.path, segmented.store.spec)


def _write_familiarity(segmented: SegmentedSlide, folder: Path) -> None:
    if segmented.familiarity is not None:
        write_familiarity(folder / FAMILIARITY, segmented.familiarity)


def _write_preview(segmented: SegmentedSlide, folder: Path) -> None:
    picture = segmented.picture
    areas = class_areas(segmented.measured[1], picture.classes)
    write_preview(
        folder / PREVIEW,
        picture.rgb_HWC,
        picture.labels_HW,
        areas,
        title=segmented.name,
        um_per_px=picture.um_per_px,
        unfamiliar_HW=picture.unfamiliar_HW,
        warning=segmented.warning,
    )


OUTPUTS: dict[str, Output] = {
    "pyramid": Output(
        progress="building the pyramid",
        files={MAP_END: "probabilities and classes as OME-Zarr: QuPath, napari, Vitessce, Fiji"},
        write=_write_pyramid,
        beside=True,
    ),
    "join": Output(
        progress="joining polygons",
        files={GEOJSON_END: "polygons for QuPath", GEOPARQUET_END: "polygons as GeoParquet: GeoPandas, R, GIS"},
        write=_write_polygons,
    ),
    "left out": Output(
        progress="writing left-out areas",
        files={LEFT_OUT: "folds, pen, dust and other areas beside the tissue, for QuPath"},
        write=_write_left_out,
    ),
    "familiarity": Output(
        progress="writing the familiarity",
        files={FAMILIARITY: "the parts of the tissue that do not look like the model's training data"},
        write=_write_familiarity,
    ),
    "preview": Output(
        progress="drawing the preview",
        files={PREVIEW: "a picture for slides and papers"},
        write=_write_preview,
    ),
}
"""Every output, in the order in which they are started."""


def file_description(name: str) -> str:
    """Return what the slide's page states about a file of a result."""
    files = {end: text for output in OUTPUTS.values() for end, text in output.files.items()}
    files[RUN] = "everything about the run, for programs"
    files[LISTING] = "the size and digest of each file of the map"
    files[BLOCKS] = "facts about each block, for a repair"
    # One end is the end of another.
    ends = sorted((end for end in files if name.endswith(end)), key=len)
    return files[ends[-1]] if ends else ""
