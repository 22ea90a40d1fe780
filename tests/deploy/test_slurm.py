"""A real Slurm of one node, and the script that puts slides on it."""

from __future__ import annotations

import csv
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from dask_jobqueue.slurm import SLURMCluster

from tests.deploy.files import DEPLOY, debian_tool, output_of
from tests.flows.servers import until
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


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("segment_on_slurm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replaced_sbatch(folder: Path, refused_calls: str, accept: str) -> dict[str, str]:
    """Return an environment whose sbatch fails in some of its calls, such as "2|3", and otherwise runs `accept`."""
    folder.mkdir()
    programs = {
        # mkdir, because Dask calls sbatch several times at once.
        "sbatch": f"""\
            call=1
            while ! mkdir {folder}/call-$call 2>/dev/null; do call=$((call + 1)); done
            case $call in
              {refused_calls})
                echo "sbatch: error: Socket timed out on send/recv operation" >&2
                echo "sbatch: error: Batch job submission failed" >&2
                exit 1 ;;
            esac
            {accept}""",
        "scancel": "",
    }
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


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


@pytest.mark.full
def test_a_cancelled_job_is_replaced_although_sbatch_fails_at_first(slurm: dict[str, str], tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "results"
    slides.mkdir()
    for name in "abcdef":
        write_slide(slides / f"{name}.svs", painted((1200, 900), ((20, 20, 1160, 860), PURPLE)))
    programs = replaced_sbatch(tmp_path / "programs", "2", f'exec {shutil.which("sbatch")} "$@"')
    (tmp_path / "programs" / "scancel").unlink()
    command = [sys.executable, str(SCRIPT), "--jobs", "1", "--cores", "1", "--memory", "3GB", "--interface", "lo",
               "--shared", str(tmp_path / "shared"), "--", str(slides), "--output", str(out)]  # fmt: skip
    with subprocess.Popen(
        command, env=slurm | {"PATH": programs["PATH"]}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        until((out / "a" / "run.json").exists, seconds=240, what="the first slide")
        output_of("scancel", "--user", getpass.getuser(), env=slurm)
        finished = len(list(out.glob("*/run.json")))
        printed, _ = run.communicate(timeout=240)
    assert finished < 5, "the batch can end without a new job; use more slides"
    assert run.returncode == 0, printed
    assert printed.count("Slurm did not accept a job; retrying every 10 s: sbatch: error: Socket timed out") == 1
    assert sorted(path.name for path in (tmp_path / "programs").glob("call-*")) == ["call-1", "call-2", "call-3"]


def test_a_job_that_sbatch_refuses_is_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script()
    programs = replaced_sbatch(tmp_path / "programs", "1", 'echo "Submitted batch job 7"')
    monkeypatch.setenv("PATH", programs["PATH"])
    options = {"interface": "lo", "log_directory": str(tmp_path), "scheduler_options": {"dashboard_address": ":0"}}
    with SLURMCluster(job_cls=script.Job, cores=1, memory="1GB", **options) as cluster:
        for _ in range(2):
            cluster.worker_spec |= cluster.new_worker_spec()
        assert script.submit(cluster) == (
            "sbatch: error: Socket timed out on send/recv operation; sbatch: error: Batch job submission failed"
        )
        assert len(cluster.workers) == 1
        for _ in range(2):  # the second time, no job is missing
            assert script.submit(cluster) == ""
            assert [job.job_id for job in cluster.workers.values()] == ["7", "7"]
    assert sorted(path.name for path in (tmp_path / "programs").glob("call-*")) == ["call-1", "call-2", "call-3"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("exit 1", "Command exited with non-zero exit code.; Exit code: 1"),
        (
            "echo ok, queued",
            "Could not parse job id from submission command output.; Job id regexp is '(?P<job_id>\\\\d+)'; "
            "Submission command output is:; ok, queued",
        ),
    ],
)
def test_an_sbatch_that_fails_silently_or_names_no_job_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, error: str
) -> None:
    script = load_script()
    monkeypatch.setenv("PATH", replaced_sbatch(tmp_path / "programs", "none", answer)["PATH"])
    options = {"interface": "lo", "log_directory": str(tmp_path), "scheduler_options": {"dashboard_address": ":0"}}
    with SLURMCluster(job_cls=script.Job, cores=1, memory="1GB", **options) as cluster:
        cluster.worker_spec |= cluster.new_worker_spec()
        assert script.submit(cluster) == error
        assert cluster.workers == {}


def test_wsi_segment_is_stopped_before_an_unexpected_error_ends_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, started, stopped = (tmp_path / name for name in ("program", "started", "stopped"))
    program.write_text(f"""\
#!{sys.executable}
import signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    Path("{started}").touch()
    time.sleep(60)
finally:
    Path("{stopped}").touch()
""")
    program.chmod(0o755)
    script = load_script()

    def broken(_: object) -> str:
        until(started.exists, seconds=30, what="the start of wsi-segment")
        raise KeyError("unexpected")

    monkeypatch.setattr(script, "submit", broken)
    monkeypatch.setattr(script, "CHECK_S", 0.1)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of pytest stay
    with pytest.raises(KeyError, match="unexpected"):
        script.segment(SimpleNamespace(scheduler_address="tls://127.0.0.1:1"), [])
    assert stopped.exists()


def test_the_script_ends_with_the_error_of_sbatch_if_slurm_accepts_no_job(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--interface", "lo", "--shared", str(tmp_path / "shared"), "--", "a.svs"]
    environment = replaced_sbatch(tmp_path / "programs", "*", "")
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (run.returncode, run.stderr) == (
        2,
        "Slurm did not accept any job: sbatch: error: Socket timed out on send/recv operation; "
        "sbatch: error: Batch job submission failed\n",
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--jobs", "0", "argument --jobs: must be 1 or more, not 0"),
        ("--cores", "0", "argument --cores: must be 1 or more, not 0"),
        ("--gpus", "2", "argument --gpus: invalid choice: 2"),
        ("--memory", "lots", "argument --memory: invalid size value: 'lots'"),
        ("--memory", "0", "argument --memory: must be 1MB or more, not '0'; write the unit, as in 8GB"),
        ("--memory", "8", "argument --memory: must be 1MB or more, not '8'; write the unit, as in 8GB"),
    ],
)
def test_an_option_that_no_job_can_have_is_refused(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        load_script().parser().parse_args([option, value, "--", "a.svs"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
