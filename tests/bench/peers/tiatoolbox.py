"""Times TIAToolbox's SemanticSegmentor on a slide, with the segmenter of one of our bundles.

    python -m venv --system-site-packages tia     # beside the packages that this project needs
    tia/bin/pip install --no-deps "tiatoolbox==2.1.*" bokeh defusedxml flask flask-cors glymur ipywidgets llvmlite \
        numba pathlib-abc pydicom pynndescent SimpleITK tokenizers transformers umap-learn universal-pathlib wsidicom
    tia/bin/python -m tests.bench.peers.tiatoolbox CMU-1.svs [-m MODEL] [-b 8] [-j 0] [--json FILE]

`--no-deps`, because it asks for a torch before 2.13. Tiles of the bundle's size at its resolution, at a stride of
three quarters of a patch, on the tissue that TIAToolbox finds; probabilities at the tiles' own
resolution are merged and saved as Zarr. Our command runs the classifier and writes polygons as well.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle, load_networks
from models.segmenter import logits_at_stride
from tests.bench.one_run import peak_bytes, since_start_s


class BundleSegmenter(nn.Module):
    """A bundle's segmenter as TIAToolbox calls one: images (N, H, W, 3) of bytes -> probabilities (N, H, W, K)."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        segmenter: Any = load_networks(bundle)[1].eval()
        self.segmenter: nn.Module = segmenter.to(memory_format=torch.channels_last)
        self.mean: Tensor
        self.register_buffer("mean", torch.tensor(bundle.card.mean).view(1, 3, 1, 1))
        self.std: Tensor
        self.register_buffer("std", torch.tensor(bundle.card.std).view(1, 3, 1, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.segmenter((x_NCHW / 255.0 - self.mean) / self.std)
        return logits_at_stride(logits, 1).softmax(dim=1)

    @staticmethod
    def infer_batch(model: nn.Module, batch_data: Tensor, *, device: str) -> NDArray[np.float32]:
        """What the engine calls for each batch."""
        with torch.inference_mode():
            probs_NKHW = model(batch_data.to(device).permute(0, 3, 1, 2).float())
        probs_NHWK: NDArray[np.float32] = probs_NKHW.permute(0, 2, 3, 1).cpu().numpy()
        return probs_NHWK

    @staticmethod
    def preproc_func(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Nothing: normalization is part of the network."""
        return image_HWC

    @staticmethod
    def postproc_func(probs_HWK: Any) -> Any:
        """Class of each pixel."""
        return probs_HWK.argmax(axis=-1)


TILE = 224
"""Side of TIAToolbox's patches in model pixels. They overlap by a quarter."""


class Counted(BundleSegmenter):
    """Tells how many tiles it was given."""

    tiles = 0

    @staticmethod
    def infer_batch(model: nn.Module, batch_data: Tensor, *, device: str) -> NDArray[np.float32]:
        Counted.tiles += len(batch_data)
        return BundleSegmenter.infer_batch(model, batch_data, device=device)


def measure(path: Path, model: str, device: str, batch_size: int, num_workers: int) -> dict[str, Any]:
    """Segment the slide and return times, peak memory and versions. Needs TIAToolbox."""
    from models.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    import tiatoolbox  # type: ignore[import-not-found]
    from tiatoolbox.models.engine.io_config import IOSegmentorConfig  # type: ignore[import-not-found]
    from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor  # type: ignore[import-not-found]

    bundle = load_bundle(model)
    card = bundle.card
    resolution = {"units": "mpp", "resolution": card.mpp}
    tile = (TILE, TILE)
    stride = TILE * 3 // 4
    io = IOSegmentorConfig(
        input_resolutions=[resolution],
        output_resolutions=[resolution],
        patch_input_shape=tile,
        patch_output_shape=tile,
        stride_shape=(stride, stride),
        save_resolution=resolution,
    )
    engine = SemanticSegmentor(Counted(bundle), batch_size=batch_size, num_workers=num_workers, device=device)
    ready_s = since_start_s()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = engine.run(
            [path],
            ioconfig=io,
            patch_mode=False,
            save_dir=Path(folder) / "result",
            output_type="zarr",
            return_probabilities=True,
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        segment_s = time.perf_counter() - begun
        written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        "slide": path.name,
        "start_s": ready_s,
        "segment_s": segment_s,
        "wall_s": since_start_s(),
        "cpu_s": time.process_time(),
        "tiles": Counted.tiles,
        "peak_bytes": peak_bytes(),
        "written_bytes": written,
        "outputs": len(output),
        "batch_size": batch_size,
        "versions": {"tiatoolbox": tiatoolbox.__version__, "torch": torch.__version__},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once in this process and print what it took."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers.tiatoolbox")
    parser.add_argument("slide", type=Path)
    parser.add_argument("-m", "--model", default=DEFAULT_BUNDLE, help="name or folder of a bundle")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-b", "--batch-size", type=int, default=8)
    parser.add_argument("-j", "--num-workers", type=int, default=0, help="processes that read; 0: this one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    found = measure(options.slide, options.model, options.device, options.batch_size, options.num_workers)
    text = json.dumps(found, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
