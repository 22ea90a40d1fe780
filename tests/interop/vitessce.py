"""The configuration for Vitessce that docs/viewing.md shows."""

from __future__ import annotations

SCOPES = {"coordinationScopes": {"dataset": "A"}}


CONFIGURATION: dict[str, object] = {
    "version": "1.0.17",
    "name": "slide",
    "description": "",
    "initStrategy": "auto",
    "coordinationSpace": {"dataset": {"A": "A"}},
    "layout": [
        {"component": "spatialBeta", **SCOPES, "x": 0, "y": 0, "w": 9, "h": 12},
        {"component": "layerControllerBeta", **SCOPES, "x": 9, "y": 0, "w": 3, "h": 12},
    ],
}
"""The configuration lacks only the address of a map. Colors, windows and pixel size come from the store."""
