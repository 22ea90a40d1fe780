"""Simulate labeling: how good a model is after 50 to 800 labels, by the order of the patches.

    python -m tests.bench.label_order --data FOLDER -o runs/label-order     # docs/benchmarks/label-order.md

FOLDER contains glas, ebhi-seg and kather2016. Labels are taken from masks. A seed holds out a third of the patients
(slides of kather-2016) and shuffles the rest. After each budget, one logistic regression per class learns the labeled
patches. Presence F1 is that of the patches of the held-out patients. For the mIoU, the weights are applied to each cell
of the feature map (CAM), and the class with the highest logit wins; all pixels of the held-out patients are pooled.

Feature maps and finished runs are kept in the output folder and not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.bundle import load_bundle
from pipeline.labeling.patches import round_robin
from pipeline.labeling.picks import CANDIDATES, START, picked
from pipeline.labeling.presence_head import PresenceHead, fit_head
from pipeline.training.evaluate import confusion_matrix, scores
from tests.bench.colorectal import f1_score
from tests.bench.label_pool import SOURCES, STRIDE, Pool, load_pool
from tests.bench.typical import typical
from tests.bench.weak_supervision import mean_and_spread

BUDGETS = (50, 100, 200, 400, 800)

ALL = "all"
"""Every patch of the training patients is labeled."""

MEASURES = {"f1": "presence F1", "miou": "mIoU"}

COLORS = ("#0072b2", "#d55e00", "#009e73")
"""Of the strategies, from the palette of Okabe and Ito."""

Result = dict[str, Any]
"""The content of a result file."""

MAP_STRIDE = 4
"""Model pixels per pixel of the class map, as in the maps of wsi-segment."""

FOLDS = 3
"""Parts of the patients, one of which a seed holds out."""


@dataclass(frozen=True)
class Person:
    """A simulated person: the patches of the training patients, and which of them are labeled, in order."""

    features_NF: NDArray[np.float32]
    present_NK: NDArray[np.bool_]
    groups: Sequence[NDArray[np.int64]]
    """Patches of each patient or slide, in random order."""
    rng: np.random.Generator
    labeled: list[int] = field(default_factory=list)

    def unlabeled(self) -> Iterator[int]:
        """Yield the patches without a label, in turn from each patient: the random order of wsi-label."""
        done = set(self.labeled)
        return (patch for patch in round_robin(group.tolist() for group in self.groups) if patch not in done)


Order = Callable[[Person], Iterator[int]]
"""Yields the next patch to label. It is added to the person's labels before the next one is asked for."""


def random_order(of: Person) -> Iterator[int]:
    """Yield the patches in random order, in turn from each patient."""
    yield from of.unlabeled()


def typical_order(of: Person) -> Iterator[int]:
    """Yield typical patches of the clusters of each patient, in turn from each patient with the fewest labels."""
    while True:
        count = math.ceil(START / len(of.groups))
        done = set(of.labeled)
        chosen: list[tuple[int, list[int]]] = []
        for group in of.groups:
            labeled = [n for n, patch in enumerate(group.tolist()) if patch in done]
            found = typical(of.features_NF[group], labeled, count, of.rng)
            chosen.append((len(labeled), group[found].tolist()))
        yield from islice(round_robin(found for _, found in sorted(chosen, key=itemgetter(0))), START)


def picked_order(of: Person) -> Iterator[int]:
    """Yield what wsi-label picks: after every `STEP` labels, the least certain of `CANDIDATES` patches."""
    while True:
        candidates = np.array(list(islice(of.unlabeled(), CANDIDATES)))
        artifact_L1 = np.zeros((len(of.labeled), 1))
        answers_LX = np.concatenate([of.present_NK[of.labeled], artifact_L1], axis=1)
        yield from candidates[picked(of.features_NF[of.labeled], answers_LX, of.features_NF[candidates])].tolist()


def after(first: Order, then: Order) -> Order:
    """Return an order that takes `START` patches of one order, and then those of another."""

    def order(of: Person) -> Iterator[int]:
        yield from islice(first(of), START)
        yield from then(of)

    return order


STRATEGIES: dict[str, Order] = {
    "random": random_order,
    "random, then uncertain": after(random_order, picked_order),
    "typical, then uncertain": after(typical_order, picked_order),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the tables, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="colon-gland", help="bundle of the features, not trained on the data set")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # Features and scores of two models must not be mixed.
    bundle = load_bundle(options.model)
    output = options.output / bundle.digest[:12]
    for name in options.sets:
        pool = load_pool(name, options.data, output, bundle)
        for seed in options.seeds:
            for strategy in (*STRATEGIES, ALL):
                run(pool, name, strategy, seed, output)
    results = [json.loads(file.read_text()) for file in sorted(output.glob("*.json"))]
    print(table(results))
    draw(results, output / "label-order.svg")


def run(pool: Pool, name: str, strategy: str, seed: int, output: Path, budgets: Sequence[int] = BUDGETS) -> None:
    """Simulate one person and write the scores after each budget, unless they are there."""
    file = output / f"{name}-{strategy.replace(', ', '-').replace(' ', '-')}-{seed}.json"
    if file.is_file():
        return
    began = time.process_time()
    tested_I = held_out(pool.group_I, seed)
    training_N = np.flatnonzero(~tested_I[pool.image_N])
    person = person_of(pool, training_N, seed)
    at = {}
    if strategy == ALL:
        at[len(training_N)] = measured(pool, fit_head(person.features_NF, person.present_NK.astype(float)), tested_I)
    else:
        order = STRATEGIES[strategy](person)
        for budget in (one for one in budgets if one <= len(training_N)):
            # One at a time, because an order looks at the labels before it.
            for patch in islice(order, budget - len(person.labeled)):
                person.labeled.append(patch)
            head = fit_head(person.features_NF[person.labeled], person.present_NK[person.labeled].astype(float))
            at[budget] = measured(pool, head, tested_I)
    result = {"set": name, "strategy": strategy, "seed": seed, "at": at, "seconds": time.process_time() - began}
    file.write_text(json.dumps(result))
    print(json.dumps(result), flush=True)


def person_of(pool: Pool, training_N: NDArray[np.int64], seed: int) -> Person:
    """Return a person who labels the patches of the training patients, which are shuffled."""
    rng = np.random.default_rng(seed)
    group_N = pool.group_I[pool.image_N[training_N]]
    groups = [rng.permutation(np.flatnonzero(group_N == group)) for group in rng.permutation(np.unique(group_N))]
    return Person(pool.features_NF[training_N], pool.present_NK[training_N], groups, rng)


def held_out(group_I: NDArray[np.str_], seed: int) -> NDArray[np.bool_]:
    """Return which images are tested: those of every third patient or slide, from another one on for each seed."""
    return np.isin(group_I, np.unique(group_I)[seed % FOLDS :: FOLDS])


def measured(pool: Pool, head: PresenceHead, tested_I: NDArray[np.bool_]) -> dict[str, float]:
    """Return the presence F1 and the mIoU of a head on the tested images."""
    tested_N = tested_I[pool.image_N]
    truth_NK, found_NK = pool.present_NK[tested_N], head.logits(pool.features_NF[tested_N]) > 0
    counts = sum(
        confusion_matrix(truth_HW, class_map(head, pool.maps[i], truth_HW.shape), len(pool.names))
        for i in np.flatnonzero(tested_I)
        for truth_HW in [pool.truths[i][MAP_STRIDE // 2 :: MAP_STRIDE, MAP_STRIDE // 2 :: MAP_STRIDE]]
    )
    return {"f1": presence_f1(truth_NK, found_NK), "miou": scores(np.asarray(counts), pool.names).miou}


def presence_f1(truth_NK: NDArray[np.bool_], found_NK: NDArray[np.bool_]) -> float:
    """Return the mean F1 of both answers, "present" and "absent", for all classes; without answers that are never true.

    "Present" alone would hardly differ between orders, because most patches of glands contain both classes.
    """
    truth_NX, found_NX = (np.concatenate([one_NK, ~one_NK], axis=1) for one_NK in (truth_NK, found_NK))
    columns = zip(truth_NX.T, found_NX.T, strict=True)
    return float(np.mean([f1_score(truth_N, found_N) for truth_N, found_N in columns if truth_N.any()]))


def class_map(head: PresenceHead, map_Fhw: NDArray[np.float16], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the class with the highest logit in each pixel of a map of this shape, (H, W)."""
    logits_hwK = head.logits(map_Fhw.transpose(1, 2, 0).astype(np.float32))
    logits_1Khw = torch.from_numpy(logits_hwK.astype(np.float32)).permute(2, 0, 1)[None]
    up_1KHW = F.interpolate(logits_1Khw, scale_factor=STRIDE // MAP_STRIDE, mode="bilinear", align_corners=False)
    return np.asarray(up_1KHW[0, :, : shape[0], : shape[1]].argmax(dim=0).numpy().astype(np.uint8))


def values(results: Sequence[Result], name: str, strategy: str, measure: str) -> dict[int, list[float]]:
    """Return the values of a measure by budget, in the order of the seeds."""
    own = sorted(
        (one for one in results if one["set"] == name and one["strategy"] == strategy), key=lambda r: r["seed"]
    )
    found: dict[int, list[float]] = {}
    for one in own:
        for budget, measures in one["at"].items():
            found.setdefault(0 if strategy == ALL else int(budget), []).append(measures[measure])
    return found


def table(results: Sequence[Result]) -> str:
    """Return the Markdown tables of each measure: mean and standard deviation over the seeds, in per cent."""
    lines, budgets = [], budgets_of(results)
    for measure, title in MEASURES.items():
        lines += [f"| {title} | order | {' | '.join(map(str, budgets))} | all |", "|---" * (len(budgets) + 3) + "|"]
        for name in dict.fromkeys(one["set"] for one in results):
            (ceiling,) = values(results, name, ALL, measure).values()
            for strategy in STRATEGIES:
                found = values(results, name, strategy, measure)
                cells = [mean_and_spread(found.get(budget, [])) for budget in budgets]
                lines.append(f"| {name} | {strategy} | {' | '.join(cells)} | {mean_and_spread(ceiling)} |")
        lines.append("")
    return "\n".join(lines)


def budgets_of(results: Sequence[Result]) -> list[int]:
    """Return the budgets of the results, ascending."""
    return sorted({int(budget) for one in results if one["strategy"] != ALL for budget in one["at"]})


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw each measure against the budget: the mean over the seeds, and a band of one standard deviation."""
    names, budgets = list(dict.fromkeys(one["set"] for one in results)), budgets_of(results)
    figure = Figure(figsize=(4 * len(names), 6), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(names), squeeze=False)
    for row, (measure, title) in enumerate(MEASURES.items()):
        for column, name in enumerate(names):
            axis = axes[row, column]
            for color, strategy in zip(COLORS, STRATEGIES, strict=True):
                found = values(results, name, strategy, measure)
                own = [budget for budget in budgets if budget in found]
                mean_B, spread_B = (np.array([f(found[budget]) for budget in own]) for f in (np.mean, np.std))
                axis.plot(own, mean_B, color=color, marker="o", markersize=3, label=strategy)
                axis.fill_between(own, mean_B - spread_B, mean_B + spread_B, color=color, alpha=0.15, linewidth=0)
            (ceiling,) = values(results, name, ALL, measure).values()
            axis.axhline(np.mean(ceiling), color="black", linestyle="dashed", label="all labels")
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, [str(budget) for budget in budgets])
            axis.set(title=name, xlabel="labeled patches", ylabel=title)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
