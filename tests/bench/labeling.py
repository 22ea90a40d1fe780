"""How long `wsi-label` takes from Enter to the next patch, in Chromium, while it picks patches in the background.

    python -m tests.bench.labeling SLIDE [--patches 100] [--pause 500]

Each patch gets one of two classes in turn. The time ends when the picture of the next patch is decoded and painted:
after the second animation frame. The labels are thrown away.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser import FLAGS, chromium, until

FIRST = "wsiLabel.single.patch && document.querySelector('#stage .patch')?.complete"
LIMIT_MS = 100
"""docs/labeling.md promises the next patch within this time."""

NEXT_PATCH = """async (keys) => {
    const id = wsiLabel.single.patch.id;
    const begun = performance.now();
    for (const key of keys) {
        document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    }
    const { single } = wsiLabel;
    const shown = () => single.patch && single.patch.id !== id ? document.querySelector("#stage .patch") : null;
    while (!shown()) await new Promise(requestAnimationFrame);
    await shown().decode();
    for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
    return [performance.now() - begun, wsiLabel.single.patch.reason];
}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the times of the first and the second half of the patches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--patches", type=int, default=100)
    parser.add_argument("--pause", type=int, default=500, help="milliseconds before each label")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, labeling(options.slide, Path(folder)) as page:
        answers = [labeled(page, number, options.pause) for number in range(options.patches)]
    half = options.patches // 2
    for name, part_with_reasons in (("first", answers[:half]), ("second", answers[half:])):
        part = [time for time, _ in part_with_reasons]
        ordered = sorted(part)
        picked = sum(reason == "uncertain" for _, reason in part_with_reasons)
        late = sum(time > LIMIT_MS for time in part)
        print(
            f"{name} {len(part)} patches: median {statistics.median(part):.0f} ms, "
            f"p95 {ordered[int(0.95 * len(part))]:.0f}, largest {ordered[-1]:.0f}, {late} above {LIMIT_MS}; "
            f"{picked} picked as uncertain"
        )


def labeled(page: Page, number: int, pause_ms: int) -> tuple[float, str]:
    """Label the patch on the page after a pause. Return the time to the next one, in ms, and why it was picked."""
    page.wait_for_timeout(pause_ms)
    milliseconds, reason = page.evaluate(NEXT_PATCH, ["1" if number % 3 else "2", "Enter"])
    return float(milliseconds), str(reason)


@contextmanager
def labeling(slide: Path, folder: Path) -> Iterator[Page]:
    """Yield the labeling page of a slide; the server runs in its own process, as a user's does."""
    command = [sys.executable, "-m", "pipeline.cli.label", str(slide), "-o", str(folder / "labels")]
    command += ["--classes", "one,two", "--annotator", "bench", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, sync_playwright() as playwright:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0]
            with playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS)) as browser:
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.goto(url)
                until(page, FIRST, seconds=60)
                yield page
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
