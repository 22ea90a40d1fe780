"""What earlier runs left in the output folder: finished results, and slides that failed permanently.

results/slide/               a finished result; `run.json` holds its identity and the stamp of the slide's file
results/.slide.failed.json   a slide that failed permanently: stamp, model, settings, versions and error

Each failed slide has a file of its own, because runs that share an output folder write at the same time: no file is
shared, no lock is needed, and the file disappears with the success of its slide.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from models.bundle import load_bundle
from models.errors import ModelError
from pipeline.batch.attempt import Attempt
from pipeline.config import SegmentConfig
from pipeline.files import write_atomically
from pipeline.results.folder import finished_run
from pipeline.results.record import read_header, run_identity, stored_runtime
from pipeline.results.slide_result import SlideResult, skipped_result
from pipeline.workers.base import SlideJob, job_config
from wsi.errors import SlideError, WsiSegmentError
from wsi.readers import reader_versions
from wsi.slide import slide_stamp

log = logging.getLogger(__name__)


class EarlierRuns:
    """Answers from the output folder what an attempt at a slide would give. Threads may call it at the same time.

    A slide is the same if the sizes and times of its files are (`slide_stamp`): nothing of the slide is read. Raises
    ModelError if the model cannot be loaded.
    """

    def __init__(self, output: Path, model: str, config: SegmentConfig, *, retry_failed: bool = False) -> None:
        """`retry_failed`: ignore failures of earlier runs. `config.force` ignores earlier failures and results."""
        self._output = output
        self._model = model
        self._config = config
        self._retry_failed = retry_failed or config.force
        self._digests = {model: load_bundle(model, config.model_digest).digest}

    def result(self, job: SlideJob) -> SlideResult | None:
        """Return the result that earlier runs left for this slide; None if the slide has to be attempted."""
        start = time.perf_counter()
        try:
            found = self._finished(job) or self._failed(job)
        except (WsiSegmentError, OSError):
            return None  # the attempt reports the error, or retries a stale mount
        return None if found is None else replace(found, seconds=time.perf_counter() - start)

    def stamp(self, job: SlideJob) -> str | None:
        """Return the stamp of the slide's file; None if the file cannot be examined."""
        try:
            return slide_stamp(job.path)
        except (SlideError, OSError):
            return None

    def record(self, job: SlideJob, stamp: str | None, attempt: Attempt) -> None:
        """Remember a slide that failed permanently; forget the failure of one that did not fail.

        `stamp` is that of the slide's file before the attempt. A file that is gone or has changed since then is not
        remembered, because the attempt may have failed for that reason.
        """
        path = self._failure_file(job)
        try:
            if attempt.result.status != "failed":
                path.unlink(missing_ok=True)
            elif attempt.lasting and stamp is not None and stamp == self.stamp(job):
                path.parent.mkdir(parents=True, exist_ok=True)
                facts = self._inputs(job, stamp) | {"error": attempt.result.error}
                write_atomically(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        except ModelError:
            log.debug("%s: the failure is not remembered without the model's digest", job.path.name)
        except OSError as error:
            log.warning("%s: cannot update %s: %s", job.path.name, path, error.strerror or error)

    def _finished(self, job: SlideJob) -> SlideResult | None:
        folder = self._output / job.result_name
        header = None if self._config.force else read_header(folder)
        if header is None:
            return None
        config = job_config(job, self._config)
        runtime = stored_runtime(folder, config) if config.runtime == "auto" else config.runtime
        if runtime is None:
            return None
        digest = str(header.identity.get("slide"))
        identity = run_identity(digest, self._digest(job), config.parameters(runtime))
        run = finished_run(folder, identity, read=config.repair)
        if run is None or run.slide.stamp != slide_stamp(job.path):
            return None
        return skipped_result(job.result_name, folder, run, 0.0)

    def _failed(self, job: SlideJob) -> SlideResult | None:
        if self._retry_failed:
            return None
        try:
            facts = json.loads(self._failure_file(job).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(facts, dict) or {**facts, "error": ""} != {
            **self._inputs(job, slide_stamp(job.path)),
            "error": "",
        }:
            return None
        return SlideResult(job.result_name, "failed", 0.0, error=str(facts.get("error")), failed_before=True)

    def _inputs(self, job: SlideJob, stamp: str) -> dict[str, object]:
        """Return everything that has to be the same for an attempt to fail in the same way."""
        config = job_config(job, self._config)
        # The requested runtime: to resolve "auto", the model would have to be loaded for slides that are not attempted.
        parameters = config.parameters("torch") | {"runtime": config.runtime, "max_bad_share": config.max_bad_share}
        return {
            "slide": job.path.name,
            "stamp": stamp,
            "model": self._digest(job),
            "parameters": parameters,
            "wsi-segment": version("wsi-segment"),
            "readers": reader_versions(),  # a newer library may read the slide
        }

    def _digest(self, job: SlideJob) -> str:
        model = job.model or self._model
        if model not in self._digests:
            self._digests[model] = load_bundle(model, self._config.model_digest).digest
        return self._digests[model]

    def _failure_file(self, job: SlideJob) -> Path:
        result = self._output / job.result_name
        return result.with_name(f".{result.name}.failed.json")
