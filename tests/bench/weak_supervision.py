"""The table of docs/benchmarks/weak-supervision.md: recipes trained from presence labels, measured on the test split.

    python -m tests.bench.weak_supervision --data FOLDER -o runs --rows ours paper --seeds 0 1 2

and the ablations of docs/benchmarks/colorectal-tissue.md, measured on composed images of the validation slide.

    python -m tests.bench.weak_supervision --dataset kather-2016 --split val --data FOLDER -o runs \
        --rows card card-plain card-deep --seeds 0 1 2

Each run is `wsi-train` with the settings of its row, but without the check for unfamiliar tissue. A row that differs
from another only in later stages starts from that one's classifier. Runs that are finished are not repeated, so that
rows can be added one by one. `full` is the ceiling: the same segmenter trained on the masks of the training split,
which no other row sees.

`result.json` of a run has the confusion matrix of each test image, and the table a 95 % interval over patients for each
row. `--compare ROW` tests every other row against ROW, paired by patient and seed (tests/bench/patients.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models.bundle import load_bundle
from models.devices import choose_device, processor_name
from models.predictor import Predictor
from pipeline.training.compose import composed
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, check_images, load_dataset, samples
from pipeline.training.dataset_sections import Split
from pipeline.training.evaluate import evaluate
from pipeline.training.patches import PatchImages
from pipeline.training.prepare import UNREADABLE_SHARE
from pipeline.training.presets import train_config
from pipeline.training.pseudo_masks import mask_files
from pipeline.training.train import PSEUDO_SCORES, train
from tests.bench.patients import compare, image_counts, interval, patient_counts


@dataclass(frozen=True)
class Row:
    """A recipe: a preset, what is changed in it, and the row whose classifier it shares."""

    title: str
    preset: str
    settings: tuple[str, ...] = ()
    classifier_of: str | None = None
    of_card: bool = False
    """Whether to start from the settings in the data set's card, as `wsi-train` does."""


ROWS = {
    "ours": Row("our recipe", "default"),
    "ours-deep": Row("… with maps of the whole backbone", "default", ("depth=none",)),
    "ours-gap": Row("… with average pooling (CAM) instead of the area head", "default", ("head=gap",)),
    "ours-patches": Row("… each patch alone, without regions", "default", ("region=none",)),
    "ours-labels": Row("… without the labels of overlapping patches", "default", ("overlap_labels=false",), "ours"),
    "ours-ema": Row("… without averaged weights", "default", ("ema=0.0",)),
    "ours-pda": Row("… with PDA", "default", ("attention=pda",)),
    "ours-layers": Row("… with pseudo masks of two layers", "default", ("layer_weights=[0.0, 0.3, 0.7]",)),
    "ours-pcam": Row("… with PCAM instead of the area head", "default", ("head=pcam", "cam=pcam")),
    "ours-lfi": Row("… with LFI-CAM", "default", ("head=lfi-release", "cam=lfi-cam")),
    "ours-abn": Row("… with ABN", "default", ("head=abn", "cam=abn")),
    "ours-score-cam": Row("… with Score-CAM of average pooling", "default", ("head=gap", "cam=score-cam"), "ours-gap"),
    "ours-balance": Row("… without balanced losses", "default", ("balance=false",)),
    "paper": Row("Han et al. 2022: PDA, three layers, gate", "paper"),
    "paper-pda": Row("… without PDA", "paper", ("attention=none",)),
    "paper-raw": Row("… with PDA's attention not normalized", "paper", ("normalize_attention=false",)),
    "paper-224": Row("… with segmenter inputs of 224 px", "paper", ("view=288", "margin=32")),
    "paper-layers": Row("… deep layer only", "paper", ("layer_weights=[0.0, 0.0, 1.0]",), "paper"),
    "paper+ema": Row("… with averaged weights", "paper", ("ema=0.96",)),
    "full": Row("full supervision, the same segmenter", "default", (), "ours"),
    "card": Row("the recipe of the data set's card", "default", of_card=True),
    "card-plain": Row("… without PDA", "default", ("attention=none",), of_card=True),
    "card-own": Row(
        "… the segmenter's own backbone, 256 channels in the decoder",
        "default",
        ("shared_backbone=false", "decoder_channels=256"),
        "card",
        of_card=True,
    ),
    "card-deep": Row(
        "… pseudo masks of the deep layer only", "default", ("layer_weights=[0.0, 0.0, 1.0]",), of_card=True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="glas")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        help="default: the rows of the card if it has settings, else the others",
    )
    parser.add_argument("--split", choices=("val", "test"), default="test", help="split that is measured")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="settings of all rows, name=value")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compare", choices=list(ROWS), help="test all other rows against this one")
    parser.add_argument("--tta", action="store_true", help="measure with the mean over the symmetries of a square too")
    parser.add_argument("--device", default="cpu", help="cpu (used for most figures in the docs), auto or a GPU")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    dataset = load_dataset(options.dataset, options.data)
    for seed in options.seeds:
        for name in options.rows or rows_for(dataset):
            run_row(dataset, name, seed, options.output, options.set, options.split, options.device, tta=options.tta)
    print(table(options.output))
    if options.compare is not None:
        print("\n" + comparisons(options.output, options.compare))


def rows_for(dataset: Dataset) -> list[str]:
    """Return the rows that start from the settings in the data set's card if it has any, else the others."""
    return [name for name, row in ROWS.items() if row.of_card == bool(dataset.card.settings)]


def run_row(
    dataset: Dataset,
    name: str,
    seed: int,
    output: Path,
    common: Sequence[str],
    split: Split,
    device: str,
    *,
    tta: bool,
) -> None:
    """Train and measure one row with one seed, unless its result is there."""
    row, run = ROWS[name], output / f"{name}-{seed}"
    if (run / "result.json").is_file():
        measured = json.loads((run / "result.json").read_text()).get("split", "test")
        if measured != split:
            raise SystemExit(f"{run} was measured on the split {measured}; choose another folder for {split}")
        return
    own = dataset.card.settings if row.of_card else {}
    config = train_config(row.preset, None, [*common, *row.settings, f"seed={seed}"], own)
    run.mkdir(parents=True, exist_ok=True)
    images = composed(dataset, run)
    if row.classifier_of is not None:
        source = output / f"{row.classifier_of}-{seed}" / "classifier.safetensors"
        if not source.is_file():
            raise SystemExit(f"{name} starts from the classifier of {row.classifier_of}: run that row first")
        shutil.copy(source, run)
    if name == "full":
        write_true_masks(images, run / "pseudo-masks", config)
    started = time.monotonic()
    bundle = train(dataset, run, config, device=device, familiarity=False)
    seconds = time.monotonic() - started
    result: dict[str, object] = {
        "row": name,
        "seed": seed,
        "split": split,
        "seconds": round(seconds),
        "common": list(common),
        "processor": processor_name(choose_device(device)),
        "steps": steps_of(run),
    }
    if (run / PSEUDO_SCORES).is_file():
        with (run / PSEUDO_SCORES).open(newline="", encoding="utf-8") as stream:
            result["pseudo"] = {
                row["layer"]: {key: float(row[key]) for key in ("miou", "fwiou", "accuracy")}
                for row in csv.DictReader(stream)
            }
    predictor = Predictor.from_bundle(load_bundle(bundle.path), device=device, output_stride=1)
    for flips in (False, True) if tta else (False,):
        evaluation = evaluate(predictor, images, split, flips=flips)
        for gate in (True, False):
            scores = evaluation.scores("exclude", gate=gate)
            key = ("gate" if gate else "no gate") + (", flips" if flips else "")
            result[key] = {"miou": scores.miou, "fwiou": scores.fwiou, "accuracy": scores.accuracy, **scores.iou}
        if not flips:
            result["images"] = image_counts(evaluation)
    (run / "result.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result), flush=True)


def steps_of(run: Path) -> dict[str, int]:
    """Return the number of training steps of each network that was trained in a run."""
    files = {stage: run / f"{stage}.steps.csv" for stage in ("classifier", "segmenter", "head")}
    return {
        stage: len(file.read_text(encoding="utf-8").splitlines()) - 1 for stage, file in files.items() if file.is_file()
    }


def write_true_masks(dataset: Dataset, folder: Path, config: TrainConfig) -> None:
    """Write the masks of the training split, at the model's pixel size, into the folder of the pseudo masks."""
    mpp = config.mpp or dataset.mpp
    images = PatchImages(dataset, check_images(samples(dataset, "train"), UNREADABLE_SHARE), mpp)
    for index in range(len(images)):
        (file,) = mask_files(folder, images, index, config)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.truth(index)).save(file)


def results_of(output: Path) -> list[dict[str, Any]]:
    """Return the results of all finished runs in a folder."""
    return [json.loads(file.read_text()) for file in sorted(output.glob("*/result.json"))]


def table(output: Path) -> str:
    """Return the Markdown table of all results in a folder: mean and spread over seeds, and interval over patients."""
    results = results_of(output)
    keys = list(dict.fromkeys(key for result in results for key in result if key.startswith(("gate", "no gate"))))
    lines = [
        f"| recipe | seeds | {' | '.join(f'mIoU, {key}' for key in keys)} | 95 % over patients | IoU per class "
        "| FwIoU | accuracy | pseudo masks (validation): mIoU, FwIoU, accuracy | steps | minutes |",
        "|" + "---|" * (len(keys) + 9),
    ]
    for name, row in ROWS.items():
        own = [result for result in results if result["row"] == name]
        if not own:
            continue
        cells = [mean_and_spread([result[key]["miou"] for result in own if key in result]) for key in keys]
        classes = [key for key in own[0]["gate"] if key not in {"miou", "fwiou", "accuracy"}]
        each = ", ".join(f"{k} {100 * np.mean([result['gate'][k] for result in own]):.1f}" for k in classes)
        minutes = np.mean([result["seconds"] for result in own]) / 60
        others = [mean_and_spread([result["gate"][key] for result in own]) for key in ("fwiou", "accuracy")]
        low, high = interval(counts_of(own))
        # Full supervision has no pseudo masks: those that were scored come from the classifier of its gate.
        pseudo = [result["pseudo"]["deep"] for result in own if "pseudo" in result and name != "full"]
        of_masks = ", ".join(mean_and_spread([one[key] for one in pseudo]) for key in ("miou", "fwiou", "accuracy"))
        trained = [", ".join(f"{n} {stage}" for stage, n in result.get("steps", {}).items()) for result in own]
        steps = "; ".join(dict.fromkeys(filter(None, trained)))
        cells += [f"{100 * low:.1f}–{100 * high:.1f}", each, *others, of_masks, steps]
        lines.append(f"| {row.title} | {len(own)} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def counts_of(results: Sequence[dict[str, Any]]) -> NDArray[np.int64]:
    """Return the confusion matrices (S, P, X, X) of the seeds of a row by patient, gate on."""
    by_seed = sorted(results, key=lambda result: int(result["seed"]))
    return np.stack([np.stack(list(patient_counts(result["images"]).values())) for result in by_seed])


def comparisons(output: Path, reference: str) -> str:
    """Return the Markdown table of every row against `reference`, on the seeds that both have."""
    results = results_of(output)
    lines = ["| recipe | seeds | difference | 95 % over patients | p, paired |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        seeds = {r["seed"] for r in results if r["row"] == name} & {r["seed"] for r in results if r["row"] == reference}
        if name == reference or not seeds:
            continue
        first, second = (
            counts_of([r for r in results if r["row"] == one and r["seed"] in seeds]) for one in (name, reference)
        )
        found = compare(first, second)
        lines.append(
            f"| {row.title} | {len(seeds)} | {100 * found.difference:+.1f} | {100 * found.low:+.1f} to "
            f"{100 * found.high:+.1f} | {found.p:.3f} |"
        )
    return "\n".join(lines)


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean in per cent, and with several values their standard deviation."""
    if not values:
        return ""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
