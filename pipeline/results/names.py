"""The names of the files of a result: the only place where they are spelled."""

from __future__ import annotations

RUN = "run.json"
"""The record of the run."""
PAGE = "index.html"
"""The page of one slide in its folder, and the report of all slides in the output folder."""
THUMBNAIL = "thumbnail.jpg"
"""The picture of a slide that the report shows."""
PREVIEW = "preview.png"
FAMILIARITY = "familiarity.png"
"""How far each part of the tissue lies from the training data of the model."""
BLOCKS = "blocks.jsonl"
"""The facts about each block, from which a repair starts. A slide without tissue has none."""
LEFT_OUT = "left-out.geojson"
"""The areas beside the tissue. Its name does not contain the slide's, so that it never limits the length of that."""
LISTING = "chunks.tsv"
"""The size and the digest of each file of the map."""
SUMMARY = "summary.csv"
"""The table of all slides in the output folder."""

GROUP = ".wsi-segment"
"""An empty file in every folder between the output folder and a result: its folders may be results."""

MAP_END = ".ome.zarr"
GEOJSON_END = ".geojson"
GEOPARQUET_END = ".parquet"
"""What follows the slide's name in the names of the map and the polygons."""

CORRECTIONS_END = ".corrections.sqlite"
"""What follows the name of a result in the name of the file beside it that has the corrections of wsi-view."""
SENT_END = ".corrections.geojson"
"""What follows the name of a result in the name of the file beside it that QuPath sends with its annotations."""
