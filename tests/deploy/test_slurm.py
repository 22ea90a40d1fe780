"""A real Slurm of one node, and the script that puts slides on it."""

from __future__ import annotations

import csv
import getpass
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.deploy.files import DEPLOY, debian_tool, output_of
from tests.slides import PINK, PURPLE, painted, write_slide

SCRIPT = DEPLOY / "slurm" / "segment_on_slurm.py"

PACKAGES = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm"}
MUNGE_FILES = ("key-file", "socket", "pid-file", "log-file", "seed-file")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=3500 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its like find a Slurm of one node, started here without systemd."""
    programs = {name: debian_tool(name, package) for name, package in PACKAGES.items()}
    # Not one of pytest's folders: munge requires a folder that everybody may read.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        environment = configured(folder)
        config = environment["SLURM_CONF"]
        arguments = {
            "munged": ["--foreground", *(f"--{what}={folder}/munge.{what}" for what in MUNGE_FILES)],
            "slurmctld": ["-D", "-f", config],
            "slurmd": ["-D", "-f", config],
        }
        for daemon, program in programs.items():
            output = stack.enter_context((folder / f"{daemon}.out").open("wb"))
            process = subprocess.Popen([program, *arguments[daemon]], env=environment, stdout=output, stderr=output)
            stack.callback(end, process)
            time.sleep(1.0)
            if process.poll() is not None:
                pytest.skip(f"{daemon} does not start here: {(folder / f'{daemon}.out').read_text()[-500:]}")
        if not idle(environment):
            pytest.skip(f"Slurm's node does not become idle here: {(folder / 'slurmd.out').read_text()[-500:]}")
        yield environment


def configured(folder: Path) -> dict[str, str]:
    """Write the key and the configuration of a cluster of one node; returns the environment to use it in."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key-file"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    config = CONFIG.format(
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        folder=folder,
        control_port=free_port(),
        node_port=free_port(),
        cpus=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(config, encoding="utf-8")
    return os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def idle(environment: dict[str, str]) -> bool:
    """Whether the node takes jobs, within half a minute."""
    question = ["sinfo", "-h", "-o", "%T"]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            asked = subprocess.run(question, env=environment, capture_output=True, timeout=10, check=False)
            if asked.stdout.strip() == b"idle":
                return True
        time.sleep(0.5)
    return False


@pytest.mark.full
def test_a_batch_runs_on_slurm_through_dask(slurm: dict[str, str], tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    image = painted((700, 500), ((100, 100, 300, 300), PINK), ((400, 100, 200, 300), PURPLE))
    write_slide(slides / "a.svs", image)
    write_slide(slides / "b.svs", np.ascontiguousarray(image[::-1]))
    (slides / "broken.svs").write_bytes(b"no slide")
    # --interface lo: the only network that is sure to be there.
    command = [sys.executable, str(SCRIPT), "--jobs", "1", "--cores", "1", "--memory", "3GB", "--walltime", "00:10:00",
               "--interface", "lo", "--shared", str(tmp_path / "shared"), "--", str(slides),
               "--output", str(tmp_path / "results")]  # fmt: skip
    run = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=240, check=False)

    assert run.returncode == 1, run.stdout + run.stderr
    with (tmp_path / "results" / "summary.csv").open(newline="", encoding="utf-8") as file:
        assert {row["slide"]: row["status"] for row in csv.DictReader(file)} == {
            "a": "done",
            "b": "done",
            "broken": "failed",
        }
    # The work was done by Slurm's jobs, which are over; and the keys are gone.
    logs = sorted((tmp_path / "shared" / "slurm-logs").glob("dask-worker-*.err"))
    assert logs
    assert "tls://127.0.0.1" in logs[0].read_text(encoding="utf-8")
    assert output_of("squeue", "--noheader", env=slurm) == ""
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["slurm-logs"]
