"""The plans that `wsi-segment --dry-run` prints: what a run would compute, need and take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from models.bundle import load_bundle
from models.devices import choose_device
from models.errors import ModelError
from models.predictor import Predictor
from models.runtimes import Compute, check_precision, choose_runtime, default_batch_size
from pipeline.batch.attempt import failure
from pipeline.batch.names import name_clashes, named_jobs
from pipeline.config import ResolvedSettings, SegmentConfig, resolve
from pipeline.console import printable
from pipeline.errors import ConfigError
from pipeline.slide.calibrate import seconds_per_tile
from pipeline.slide.plan import PlannedSlide, check_resources, plan_slide
from pipeline.workers.base import SlideJob, job_config
from pipeline.workers.in_process import load_predictor

log = logging.getLogger(__name__)

PlanEntry = dict[str, object]
"""The plan of one slide as `--json` prints it; with `error` if the slide would fail."""


def make_plans(jobs: Sequence[SlideJob], output: Path, model: str, config: SegmentConfig) -> list[PlanEntry]:
    """Return the plan of each slide. Write nothing outside the temporary folder.

    Raises ModelError if the model cannot be used, or if this machine would emulate the precision.
    """
    jobs = named_jobs(jobs, output)
    clashes = name_clashes(jobs)
    planner = _Planner(output, model, config, _projected_compute(config))
    return [planner.entry(job, job.problem or clashes.get(job.path, "")) for job in jobs]


@dataclass
class _Planner:
    output: Path
    model: str
    config: SegmentConfig
    compute: Compute
    rates: dict[str, float | None] = field(default_factory=dict)
    """Seconds per tile by model, measured on the first slide with tissue; None if the model cannot run here."""

    def entry(self, job: SlideJob, problem: str) -> PlanEntry:
        entry: PlanEntry = {"slide": str(job.path), "result": job.result_name}
        try:
            if problem:
                raise ConfigError(problem)
            card = load_bundle(job.model or self.model, self.config.model_digest).card
            planned = plan_slide(job.path, card, job_config(job, self.config))
            with planned.slide as slide:
                entry |= {"mpp": slide.info.mpp, "mpp_source": slide.info.mpp_source, "backend": slide.info.backend}
                settings = resolve(job_config(job, self.config), self.compute)
                entry |= planned.plan.facts(settings).as_json() | self._facts(job, planned, settings)
                entry["warnings"] = list(slide.info.warnings)
                check_resources(planned.plan, settings, job.path.name, self.output)
        except Exception as error:  # noqa: BLE001 - as in run_batch, the other slides continue
            entry["error"] = failure(job, error)
        return entry

    def _facts(self, job: SlideJob, planned: PlannedSlide, settings: ResolvedSettings) -> PlanEntry:
        """Return how the networks will be computed, and about how long the run will take."""
        facts: PlanEntry = {
            "device": settings.device,
            "runtime": settings.runtime,
            "precision": settings.precision,
            "workers": settings.num_workers,
        }
        if settings.device == "cpu":
            facts["instructions"] = torch.backends.cpu.get_cpu_capability()
        rate = self._rate(job.model or self.model, planned)
        return facts if rate is None else facts | {"seconds_estimated": float(f"{rate * planned.plan.tiles:.3g}")}

    def _rate(self, model: str, planned: PlannedSlide) -> float | None:
        if model not in self.rates and planned.plan.tiles:
            try:
                predictor: Predictor = load_predictor(model, self.config)
            except ModelError as error:
                log.warning("the time is not estimated, because this machine cannot run the networks: %s", error)
                self.rates[model] = None
            else:
                self.rates[model] = seconds_per_tile(planned, predictor, resolve(self.config, predictor.compute))
        return self.rates.get(model, 0.0)


def _projected_compute(config: SegmentConfig) -> Compute:
    """Return how a run will compute its networks, without loading them.

    A device or runtime that the user names is not looked for, because only a cluster's machines may have it. Raises
    RuntimeUnavailableError if this machine's processor would emulate the precision, or if OpenVINO is named and
    installed here, and cannot compute in the precision on a CPU.
    """
    device = str(choose_device("auto")) if config.device == "auto" else config.device
    check_precision(device, config.precision)
    here = device == "cpu" and find_spec("openvino") is not None
    runtime = config.runtime
    if runtime == "auto" or here:
        runtime = choose_runtime(runtime, device, config.precision)
    return Compute(
        device=device,
        precision=config.precision,
        # OpenVINO needs more memory than torch: the projection holds if OpenVINO cannot take the model.
        runtime=runtime,
        batch_size=config.batch_size or default_batch_size(device),
        threads=torch.get_num_threads(),
        processor="",  # of no consequence for a plan
    )


def plan_lines(entry: PlanEntry) -> list[str]:
    """Return the lines of a plan for people."""
    lines = [printable(str(entry["slide"]))]
    for name, value in entry.items():
        if name.endswith("_bytes") and isinstance(value, int):
            lines.append(f"  {name.removesuffix('_bytes'):<14}{value / 2**20:,.0f} MiB")
        elif name == "seconds_estimated":
            lines.append(f"  {'time':<14}about {value} s, from one block of the first slide")
        elif name == "warnings" and isinstance(value, list):
            lines += [f"  {'warning':<14}{printable(text)}" for text in value]
        elif name != "slide":
            shown = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
            lines.append(f"  {name.replace('_', ' '):<14}{shown}")
    return lines
