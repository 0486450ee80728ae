"""Jobs on a Slurm cluster of two nodes on this machine: a run that is stopped is requeued and ends with the same
weights, failed and cancelled jobs are not requeued, different nodes are an error, each GPU has a task, data is
prepared.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data_recipes.prepare.program import contents, make_workspace
from tests.tiny import tiny_mixture, tiny_model
from tests.train.cases import tiny_run
from tests.train.launch import ROOT, Program, finish

CLUSTER_SCRIPT = ROOT / "scripts" / "lab_slurm.sh"
SLURM = ROOT / "scripts" / "slurm"
PATIENCE_S = 600.0  # per condition; without other load the whole file takes less
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(missing), reason=f"needs Slurm: no {', '.join(missing)} (apt-get install slurm-wlm munge)"),
]


class Cluster:
    """A running Slurm cluster of two nodes, and the jobs of a test.

    Args:
        folder: of the cluster and of the output of its jobs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "RANK"))
        }
        self.env = {
            **environment,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LLAVA_NEXT_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, **more: str) -> str:
        """Runs a command, which must succeed, and returns its output."""
        done = subprocess.run(command, cwd=ROOT, env={**self.env, **more}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **more: str) -> str:
        """Submits one of the scripts; returns the job's id."""
        output = f"--output={self.folder}/%j.out"
        return self.run("sbatch", "--parsable", output, *options, str(SLURM / script), *arguments, **more)

    def details(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)

    def output(self, job: str) -> str:
        """The output of the job so far, of all its starts."""
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: str, what: str, is_so: Callable[[], bool]) -> None:
        """Waits until a condition holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, (
                f"job {job}: {what} not reached; {self.details(job)}\n{self.output(job)}"
            )
            time.sleep(0.1)

    def ended(self, job: str) -> dict[str, str]:
        """Waits for the end of the job and returns its details."""
        self.wait(job, "its end", lambda: self.details(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"))
        return self.details(job)

    def start_again_now(self, job: str) -> None:
        """Waits until the job is requeued, and shortens the two minutes that Slurm lets such a job wait.

        Slurm would confuse a start within the same second with the one that has just ended.
        """
        self.wait(job, "its place in the queue", lambda: self.details(job)["JobState"] == "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")


@contextmanager
def running_cluster(folder: Path, **settings: str) -> Iterator[Cluster]:
    """A Slurm cluster with these settings of the script, such as LAB_NODES."""
    subprocess.run([CLUSTER_SCRIPT, "start", folder], check=True, timeout=60, env={**os.environ, **settings})
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([CLUSTER_SCRIPT, "stop", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of two nodes for the tests of this file."""
    with running_cluster(tmp_path_factory.mktemp("lab")) as started:
        yield started


@pytest.fixture(scope="module")
def cluster_with_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster whose two nodes have two simulated GPUs each."""
    with running_cluster(tmp_path_factory.mktemp("lab_with_gpus"), LAB_GPUS="2") as started:
        yield started


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program on a tiny model and mixture; both stages have 37 steps."""
    folder = tmp_path_factory.mktemp("slurm_runs")
    mixture, store_root = tiny_mixture(folder / "data", 40)
    return Program(tiny_run(tiny_model(folder / "models"), mixture, store_root, folder / "outputs"), folder)


def arguments(program: Program, *overrides: str) -> list[str]:
    """The program's command line after `python -m train`."""
    return program.command("plain", "stage.epochs=12", "save.every=0", *overrides)[3:]


def weights(program: Program, name: str) -> dict[str, str]:
    """A hash of every file of weights that the two stages of a run have written."""
    files = sorted((program.root / name).glob("*/*/*.safetensors"))
    return {str(path.relative_to(program.root / name)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(program: Program, name: str, stage: str) -> list[int]:
    """The steps in a run's metrics."""
    return [line["step"] for line in program.metrics(name, stage)]


def test_a_run_that_is_stopped_twice_ends_as_if_it_had_not(cluster: Cluster, program: Program) -> None:
    """Both stages, submitted at once. The first is warned (SIGUSR1, as before its time limit), the second pre-empted by
    another job: each is saved, requeued by exit code 75, continued and ends; the weights are, bit for
    bit, those of a run on two ranks that nobody disturbed."""
    options = ("-N", "2", f"--output={cluster.folder}/%j.out")
    output = cluster.run(str(SLURM / "two_stage.sh"), *options, "--", *arguments(program, "name=disturbed"))
    jobs = dict(line.split() for line in output.splitlines())
    for stage, job in jobs.items():
        cluster.wait(job, "step 3", lambda stage=stage: len(program.metrics("disturbed", stage)) > 3)  # type: ignore[misc]
        if stage == "align":
            cluster.run("scancel", "--signal=USR1", job)
        else:
            urgent = ("--partition=urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=true")
            cluster.run("sbatch", *urgent)
        cluster.start_again_now(job)
        details = cluster.ended(job)
        assert (details["JobState"], details["ExitCode"], details["Restarts"]) == ("COMPLETED", "0:0", "1"), (
            cluster.output(job)
        )
        assert f"job {job} is requeued" in cluster.output(job)
        resumed = re.search(r"resumed from \S+ at step (\d+)", cluster.output(job))
        assert resumed is not None
        assert 4 <= int(resumed[1]) < 37
        assert steps(program, "disturbed", stage) == list(range(37))
    for stage in jobs:
        undisturbed = program.start("torchrun", *arguments(program, "name=undisturbed")[-3:], f"stage={stage}")
        code, output = finish(undisturbed, PATIENCE_S)
        assert code == 0, output
    assert len(weights(program, "undisturbed")) == 2
    assert weights(program, "disturbed") == weights(program, "undisturbed")


def test_a_mistake_is_not_started_again(cluster: Cluster, program: Program) -> None:
    """Exit code 2 is the job's own, after one sentence and one start; the stage behind it is taken off the queue."""
    options = ("-N", "2", f"--output={cluster.folder}/%j.out")
    wrong = arguments(program, "name=mistake", "align:packing.max_token=3")
    output = cluster.run(str(SLURM / "two_stage.sh"), *options, "--", *wrong)
    align, finetune = (line.split()[1] for line in output.splitlines())
    details = cluster.ended(align)
    assert (details["JobState"], details["ExitCode"], details["Restarts"]) == ("FAILED", "2:0", "0"), cluster.output(
        align
    )
    assert cluster.output(align).count("error: packing.max_token: there is no such key") == 1
    assert cluster.ended(finetune)["JobState"] == "CANCELLED"


def test_nodes_that_differ_are_refused(cluster: Cluster, program: Program) -> None:
    """The second node has another version of a package: a table, one sentence, exit code 2 from every rank."""
    details = cluster.folder / "shim" / "transformers-0.0.1.dist-info" / "METADATA"
    details.parent.mkdir(parents=True)
    details.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    python = cluster.folder / "python"
    path = f"export PYTHONPATH={cluster.folder}/shim:$PYTHONPATH"
    python.write_text(f'#!/bin/bash\n[[ $SLURM_NODEID == 1 ]] && {path}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run = arguments(program, "name=differs", "stage=align", "preflight=only")
    job = cluster.submit("train.sbatch", *run, options=("-N2",), LLAVA_NEXT_PYTHON=str(python))
    assert cluster.ended(job)["ExitCode"] == "2:0", cluster.output(job)
    sentence = r"^error: pre-flight, versions: rank 1 \(\S+\) has transformers 0\.0\.1, rank 0 \(\S+\) has \S+; .*$"
    assert len(re.findall(sentence, cluster.output(job), re.MULTILINE)) == 1, cluster.output(job)
    assert re.search(r"^FAILED +versions ", cluster.output(job), re.MULTILINE)


def test_copies_of_the_weights_in_two_nodes(cluster: Cluster, program: Program) -> None:
    """engine=zero3_node on two nodes of two tasks each learns what engine=zero3 learns: the ranks of a node come from
    Slurm's variables."""
    options = ("-N2", "--ntasks-per-node=2")
    run = ("stage.init_from=null", "stage.epochs=1", "timeout_s=300")
    small = "engine.zero_optimization.stage3_param_persistence_threshold=100"
    for engine in ("zero3", "zero3_node"):
        command = arguments(program, *run, f"name=on_{engine}", f"engine={engine}", small)
        job = cluster.submit("train.sbatch", *command, options=options)
        assert cluster.ended(job)["ExitCode"] == "0:0", cluster.output(job)
    log = (program.root / "on_zero3_node" / "finetune" / "log" / "rank_000.log").read_text()
    assert "nodes: 2 copies of the weights, 2 consecutive rank(s) each" in log
    losses = {
        engine: [line["train/loss"] for line in program.metrics(f"on_{engine}", "finetune")]
        for engine in ("zero3", "zero3_node")
    }
    assert len(losses["zero3"]) == 4
    assert losses["zero3_node"] == pytest.approx(losses["zero3"], rel=1e-5)


@pytest.mark.parametrize(("code", "act"), [(1, "fail"), (75, "cancel")])
def test_failed_and_cancelled_jobs_are_not_started_again(cluster: Cluster, code: int, act: str) -> None:
    """In place of the run stands a program that ends with 1, or with 75 once it is asked to: a job that its owner has
    cancelled stays cancelled, although its ranks say that they would go on."""
    python = cluster.folder / f"python_{act}"
    asked = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    python.write_text(f"#!/bin/bash\n{asked if act == 'cancel' else 'exit 1'}\n")
    python.chmod(0o755)
    job = cluster.submit("train.sbatch", "name=x", options=("-N2",), LLAVA_NEXT_PYTHON=str(python))
    if act == "cancel":
        cluster.wait(job, "its ranks", lambda: cluster.output(job).count("ready") == 2)
        cluster.run("scancel", job)
    details = cluster.ended(job)
    cluster.wait(job, "its last word", lambda: f"ends with exit code {code}" in cluster.output(job))
    assert details["JobState"] == {"fail": "FAILED", "cancel": "CANCELLED"}[act], cluster.output(job)
    assert cluster.details(job)["Restarts"] == "0"
    assert "is requeued" not in cluster.output(job)


STAND_IN = """
import os
from train.distributed.launch import read_launch
launch, gpus = read_launch(), os.environ.get("CUDA_VISIBLE_DEVICES", "none")
cpus, step_gpus = os.environ["SLURM_CPUS_PER_TASK"], os.environ.get("SLURM_GPUS_ON_NODE")
print(f"task rank={launch.rank} local={launch.local_rank} size={launch.size} cpus={cpus} gpus={gpus} of {step_gpus}")
"""
ALL_GPUS = [f"rank={rank} local={rank % 2} size=4 cpus=2 gpus=0,1 of 2" for rank in range(4)]
BOUND_GPUS = [f"rank={rank} local={rank % 2} size=4 cpus=2 gpus={rank % 2} of 2" for rank in range(4)]
OTHER_JOB = ("-N1", "--ntasks-per-node=1", "--gpus-per-task=1", "--cpus-per-task=1", "--mem=100M", "--array=1-1")


def stand_in_for_training(cluster: Cluster) -> dict[str, str]:
    """Variables with which train.sbatch starts a program that prints rank, CPUs and GPUs of its task."""
    (cluster.folder / "stand_in.py").write_text(STAND_IN)
    path = os.pathsep.join([str(cluster.folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {"LLAVA_NEXT_PROGRAM": "stand_in", "PYTHONPATH": path}


def printed_tasks(cluster: Cluster, job: str) -> list[str]:
    """What the tasks of a job have printed; the job must succeed."""
    assert cluster.ended(job)["ExitCode"] == "0:0", cluster.output(job)
    lines = cluster.output(job).splitlines()
    return sorted(line.removeprefix("task ") for line in lines if line.startswith("task "))


def submit_from(cluster: Cluster, start: str, *command: str, **more: str) -> str:
    """Runs a command that submits a job: in a login shell, a shell of salloc, a batch script, or a step of one."""
    if start == "login":
        return cluster.run(*command, **more)
    if start == "salloc":
        options = [option for option in OTHER_JOB if "array" not in option]
        return cluster.run("salloc", "--quiet", *options, *command, **more)
    script = cluster.folder / "other_job.sh"
    srun = "srun --ntasks=1 " if start == "step" else ""
    script.write_text(f"#!/bin/bash\ncd {ROOT}\n{srun}{shlex.join(command)}\n")
    outer = cluster.run("sbatch", "--parsable", f"--output={cluster.folder}/%A.out", *OTHER_JOB, str(script), **more)
    assert cluster.ended(outer)["ExitCode"] == "0:0", cluster.output(outer)
    return cluster.output(outer).strip()


@pytest.mark.parametrize("start", ["login", "salloc", "job", "step"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-N2",), ALL_GPUS),
        (("-N2", "--gpus-per-node=2"), ALL_GPUS),
        (("-N1", "--ntasks-per-node=1"), ["rank=0 local=0 size=1 cpus=4 gpus=0,1 of 2"]),
        (("-N1", "--oversubscribe", "--gpus-per-node=1", "--mem=1G"), ["rank=0 local=0 size=1 cpus=1 gpus=0 of 1"]),
        (("-N2", "--ntasks=4", "--gpus-per-task=1", "--cpus-per-task=2"), ALL_GPUS),
    ],
    ids=["whole nodes", "GPUs given", "tasks given", "part of a node", "GPUs per task"],
)
def test_ranks_do_not_depend_on_where_a_job_is_submitted(
    cluster_with_gpus: Cluster, start: str, options: tuple[str, ...], expected: list[str]
) -> None:
    """One task per GPU or the number that is requested, each with all GPUs of its node, also where the submitting
    shell has the variables of another job: of one task, one CPU, one GPU, and an array."""
    command = ["sbatch", "--parsable", f"--output={cluster_with_gpus.folder}/%j.out", *options]
    environment = stand_in_for_training(cluster_with_gpus)
    job = submit_from(cluster_with_gpus, start, *command, str(SLURM / "train.sbatch"), "name=x", **environment)
    # A job of one GPU has either of the node's.
    assert [task.replace("gpus=1 of 1", "gpus=0 of 1") for task in printed_tasks(cluster_with_gpus, job)] == expected


@pytest.mark.parametrize("binding", ["--gpus-per-task=1", "--gpu-bind=map_gpu:0,1"])
def test_tasks_with_one_visible_gpu_each(cluster_with_gpus: Cluster, tmp_path: Path, binding: str) -> None:
    """A site's options for srun bind GPUs to tasks, as `srun --gpus-per-task` in a shell of salloc does."""
    environment = stand_in_for_training(cluster_with_gpus)
    shutil.copytree(SLURM, tmp_path / "scripts" / "slurm")
    (tmp_path / "scripts" / "slurm" / "site.sh").write_text(f"SITE_SRUN=({binding})\n")
    script = ("env", "-C", str(tmp_path), "sbatch", "--parsable", f"--output={cluster_with_gpus.folder}/%j.out")
    job = cluster_with_gpus.run(*script, "-N2", "scripts/slurm/train.sbatch", "name=x", **environment)
    assert printed_tasks(cluster_with_gpus, job) == BOUND_GPUS
    step = ("srun", "--ntasks=4", "--cpus-per-task=2", "--gpus-per-task=1", sys.executable, "-m", "stand_in")
    output = cluster_with_gpus.run("salloc", "--quiet", "-N2", "--exclusive", *step, **environment)
    assert sorted(line.removeprefix("task ") for line in output.splitlines()) == BOUND_GPUS


def test_a_shell_of_salloc_runs_the_batch_script(cluster_with_gpus: Cluster) -> None:
    """The script without sbatch takes the shell's own allocation, with stale variables of other launchers."""
    stale = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1", "SLURM_STEP_ID": "7", "SLURM_NTASKS_PER_NODE": "1"}
    command = ("salloc", "--quiet", "-N2", "--exclusive", str(SLURM / "train.sbatch"), "name=x")
    output = cluster_with_gpus.run(*command, **stand_in_for_training(cluster_with_gpus), **stale)
    assert sorted(line[5:] for line in output.splitlines() if line.startswith("task ")) == ALL_GPUS


def test_a_merge_that_an_array_job_submits(cluster_with_gpus: Cluster) -> None:
    """The merge is no slice, although it inherits the variables of an array; an array's own task is one."""
    python = cluster_with_gpus.folder / "arguments"
    python.write_text('#!/bin/bash\necho "task $*"\n')
    python.chmod(0o755)
    command = ["sbatch", "--parsable", f"--output={cluster_with_gpus.folder}/%j.out", str(SLURM / "prepare.sbatch")]
    more = {"LLAVA_NEXT_PYTHON": str(python)}
    merge = submit_from(cluster_with_gpus, "job", *command, "--merge", "3", **more)
    assert printed_tasks(cluster_with_gpus, merge) == ["-m data_recipes.prepare --workers 4 --merge 3"]
    command[2:2] = ["--array=3-3", "--cpus-per-task=2"]
    one = submit_from(cluster_with_gpus, "step", *command, **more)
    assert printed_tasks(cluster_with_gpus, one) == ["-m data_recipes.prepare --workers 2 --slice 3/3"]


def test_acceptance_test_passes_as_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """The quick form on two nodes with one rank each; the ranks rendezvous through Slurm's variables."""
    job = cluster.submit("accept.sbatch", "--out", str(tmp_path / "out"), "--quick", options=("-N2",))
    assert cluster.ended(job)["ExitCode"] == "0:0", cluster.output(job)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["launcher"], report["ranks"]) == ("srun", 2)
    assert {check["status"] for check in report["checks"]} == {"passed"}


def test_arguments_with_spaces_reach_both_stages(tmp_path: Path) -> None:
    """Each argument as it is; one that only mentions `stage=` selects no stage, and inherited variables are unset."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\nprintf "<%s>" "$@" "${SLURM_NTASKS-none}" >&2; echo >&2; echo 7\n')
    sbatch.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{PATH}", "SLURM_NTASKS": "1"}
    command = [str(SLURM / "two_stage.sh"), "-N2", "--", "name=a stage=b", "finetune:stage=llava/finetune"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    align, finetune = done.stderr.splitlines()
    assert align.endswith("<name=a stage=b><stage=align><none>")
    assert finetune.endswith("<name=a stage=b><stage=llava/finetune><none>")


def test_an_array_prepares_what_one_program_prepares(cluster: Cluster, tmp_path: Path) -> None:
    """Two slices as an array job, and the merge as a job behind it: the stores are, byte for byte, one program's."""
    root = make_workspace(tmp_path)

    def options(stores: str) -> list[str]:
        folders = {"--raw": root / "raw", "--stores": root / stores, "--configs": root / "configs"}
        return ["--mixture", "all", *(str(word) for pair in folders.items() for word in pair)]

    limits = ("--cpus-per-task=1", "--mem-per-cpu=500M")
    slices = cluster.submit("prepare.sbatch", *options("many"), options=("--array=1-2", *limits))
    behind = (f"--dependency=afterok:{slices}", *limits)
    merge = cluster.submit("prepare.sbatch", *options("many"), "--merge", "2", options=behind)
    assert cluster.ended(merge)["ExitCode"] == "0:0", cluster.output(merge)
    command = [sys.executable, "-m", "data_recipes.prepare", *options("one"), "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE_S)
    assert contents(root / "many") == contents(root / "one")
