#!/usr/bin/env python3
"""Segment slides with workers that are Slurm jobs. Everything after `--` is passed to wsi-segment:
segment_on_slurm.py --jobs 4 --cores 8 --memory 16GB -- /data/slides --recursive -o /data/results
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import dask
from dask.utils import parse_bytes
from dask_jobqueue.slurm import SLURMCluster, SLURMJob
from distributed import Security
from distributed.core import Status

log = logging.getLogger(__name__)

SETTINGS = Path(__file__).resolve().parent.parent / "settings" / "settings.env"
TLS = "DASK_DISTRIBUTED__COMM__TLS__"

CHECK_S = 10.0
"""Seconds between two checks of whether jobs are missing."""


def main() -> int:
    """Start the workers, run wsi-segment on them, stop them, and return its exit status; 2 if Slurm accepts no job."""
    options = parser().parse_args()
    for name, value in settings():
        os.environ.setdefault(name, value)
    dask.config.refresh()  # dask read the environment at its import
    options.shared.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=options.shared, prefix=".wsi-segment-") as folder,
        SLURMCluster(
            job_cls=Job,
            cores=options.cores,
            memory=options.memory,
            # One process with one Dask thread: one slide at a time. The blocks of the slide have their own threads.
            processes=1,
            worker_extra_args=["--nthreads", "1", *(["--resources", "GPU=1"] if options.gpus else [])],
            job_script_prologue=[f"export OMP_NUM_THREADS={options.cores}"],
            job_extra_directives=[f"--gres=gpu:{options.gpus}"] if options.gpus else [],
            queue=options.partition,
            account=options.account,
            walltime=options.walltime,
            interface=options.interface,
            local_directory=options.scratch,
            log_directory=str(options.shared / "slurm-logs"),
            # Anyone who reaches a Dask scheduler can run code as you, and a cluster's network has other users.
            security=encryption(Path(folder)),
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
        ) as cluster,
    ):
        for _ in range(options.jobs):
            cluster.worker_spec |= cluster.new_worker_spec()
        error = submit(cluster)
        if error and not cluster.workers:
            parser().exit(2, f"Slurm did not accept any job: {error}\n")
        return segment(cluster, ["--num-workers", str(options.cores), *options.command])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line: options for Slurm, then the arguments of wsi-segment."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--jobs", type=positive, default=2, help="number of workers, each its own Slurm job (default: 2)")
    made.add_argument("--cores", type=positive, default=4, help="cores of each worker (default: 4)")
    made.add_argument("--memory", type=size, default="8GB", help="memory of each worker (default: 8GB)")
    made.add_argument("--gpus", type=int, choices=(0, 1), default=0, help="GPUs of each worker (default: 0)")
    made.add_argument(
        "--walltime", default="12:00:00", help="time limit of each worker; longer than the slowest slide takes"
    )
    made.add_argument("--partition", help="Slurm partition (default: the cluster's)")
    made.add_argument("--account", help="Slurm account (default: yours)")
    made.add_argument("--interface", help="network between the nodes, such as ib0")
    made.add_argument("--scratch", help="folder on each node's own disk")
    made.add_argument(
        "--shared", type=Path, default=Path.home(), help="folder that all nodes see, for keys and logs (default: home)"
    )
    made.add_argument("command", nargs="+", metavar="-- SLIDES …", help="arguments of wsi-segment")
    return made


def positive(text: str) -> int:
    """Return a number of jobs or cores."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def size(text: str) -> int:
    """Return the number of bytes of a text such as 8GB."""
    number = int(parse_bytes(text))
    if number < 1_000_000:
        raise argparse.ArgumentTypeError(f"must be 1MB or more, not {text!r}; write the unit, as in 8GB")
    return number


def settings() -> list[tuple[str, str]]:
    """Return the names and values of settings.env. Jobs inherit them with the environment of this process."""
    lines = SETTINGS.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return [(name, value) for name, _, value in pairs]


def encryption(folder: Path) -> Security:
    """Write a key and a certificate for this run into `folder`, and name them in the environment of wsi-segment."""
    made = Security.temporary()
    files = {"ca_file": folder / "certificate.pem"}
    files["ca_file"].write_text(made.tls_ca_file, encoding="utf-8")
    key = folder / "key.pem"
    key.touch(mode=0o600)
    key.write_text(made.tls_client_key, encoding="utf-8")
    for role in ("scheduler", "worker", "client"):
        files |= {f"{role}_key": key, f"{role}_cert": files["ca_file"]}
    os.environ["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "true"
    for name, path in files.items():
        part = name.upper() if name == "ca_file" else name.upper().replace("_", "__")
        os.environ[f"{TLS}{part}"] = str(path)
    return Security(require_encryption=True, **{f"tls_{name}": str(path) for name, path in files.items()})


class Job(SLURMJob):
    """A Slurm job whose status is closed after its end; Dask asserts this when the cluster closes."""

    async def close(self) -> None:
        """Cancel the job."""
        await super().close()
        self.status = Status.closed


def submit(cluster: SLURMCluster) -> str:
    """Submit the jobs that are missing: new and refused ones, and those that ended after their worker had connected.

    Return the error of sbatch, or an empty text.
    """

    async def missing_jobs() -> None:
        try:
            await cluster
        finally:
            for name, job in list(cluster.workers.items()):
                if job.job_id is None:  # Dask would not submit it again
                    await job.close()
                    del cluster.workers[name]

    try:
        cluster.sync(missing_jobs)
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error)
        # Without the command, whose file has a new name at each attempt.
        lines = (text.rpartition("stderr:")[2].strip() or text.partition("Command:")[0].strip()).splitlines()
        return "; ".join(lines) or repr(error)
    return ""


def segment(cluster: SLURMCluster, arguments: list[str]) -> int:
    """Run wsi-segment on a cluster. Ctrl-C and scancel reach it once, so it shuts down cleanly before the jobs do."""
    command = [sys.executable, "-m", "pipeline.cli.segment", *arguments, "--scheduler", cluster.scheduler_address]
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - the user's own arguments, without a shell
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: process.send_signal(signal.SIGINT))
    reported = ""
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(CHECK_S)
            error = submit(cluster)
            if error and error != reported:
                log.warning("Slurm did not accept a job; retrying every %.0f s: %s", CHECK_S, error)
            reported = error
    finally:  # the jobs end with this script, also after an unexpected error
        process.send_signal(signal.SIGINT)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
