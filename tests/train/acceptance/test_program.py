"""Tests of the acceptance test as a whole, started by the real launchers on gloo ranks: it passes without faults, and
it reports a run that learns something else and a run that hangs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.distributed.test_two_hosts import ADDRESSES, hosts  # noqa: F401  (a fixture)
from tests.train.launch import ROOT, finish
from train.plan.hardware import check_hardware

BIN = Path(sys.executable).parent
FAULTS = Path(__file__).parent / "faults"
QUICK = ["one_rank", "zero3", "links", "hardware"]
FULL = [
    "one_rank",
    *(f"zero{stage}{more}" for stage in (1, 2, 3) for more in ("", "_recompute")),
    "resume_zero2",
    "resume_zero3",
    "export",
    "speed",
    "save",
    "links",
    "hardware",
]


def launch(launcher: str, num_ranks: int, *arguments: str, timeout_s: float = 900, **more: str) -> tuple[int, str]:
    """Returns exit code and output of the program on that many ranks."""
    words = {
        "plain": [sys.executable, "-m"],
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(num_ranks), "-m"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", str(num_ranks), "--module"],
    }[launcher]
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "DS_ACCELERATOR")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{env.get('PATH', '')}", **more}
    env |= {"DS_ACCELERATOR": "cpu"} if launcher == "deepspeed" else {}
    process = subprocess.Popen(
        [*words, "train.accept", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return finish(process, timeout_s)


def report_in(out: Path) -> dict[str, Any]:
    """Returns the content of the report."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def statuses(report: dict[str, Any]) -> dict[str, str]:
    """Returns the status of each check by name."""
    return {check["name"]: check["status"] for check in report["checks"]}


@pytest.mark.full
def test_two_ranks_pass(tmp_path: Path) -> None:
    """The quick form ends with exit code 0, the verdict as the last line, numbers in the report, and a file that the
    planner accepts."""
    out = tmp_path / "out"
    code, output = launch("torchrun", 2, "--out", str(out), "--quick", "--anonymous")
    assert code == 0, output
    report = report_in(out)
    assert statuses(report) == dict.fromkeys(QUICK, "passed")
    assert output.strip().splitlines()[-1] == report["verdict"]
    assert report["verdict"].startswith("accept: PASSED")
    assert (report["ranks"], report["devices"], report["launcher"]) == (2, {"CPU": 2}, "torchrun")
    assert str(tmp_path) not in (out / "report.json").read_text()
    one_rank, zero3, links, _ = report["checks"]
    assert one_rank["numbers"]["rows"].keys() == {"blank", "text", "image"}
    assert zero3["numbers"]["steps"] == 7
    assert all(zero3["numbers"][key] <= most for key, most in zero3["tolerances"].items())
    assert links["numbers"]["groups"]["one_host"]["all_gather"][-1]["gb_s"] > 0
    hardware = check_hardware(yaml.safe_load((out / "configs/hardware/measured.yaml").read_text()))
    assert hardware.gpus_per_node == 2


def test_a_mistake_ends_with_two(tmp_path: Path) -> None:
    """An error is one sentence with the value, printed once; nothing is written."""
    (tmp_path / "something").touch()
    code, output = launch("plain", 1, "--out", str(tmp_path))
    assert code == 2, output
    assert output.startswith("error: ")
    assert str(tmp_path) in output
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.full
def test_four_ranks_pass_by_deepspeeds_launcher(tmp_path: Path) -> None:
    """The quick form passes on four ranks under the deepspeed launcher."""
    out = tmp_path / "out"
    code, output = launch("deepspeed", 4, "--out", str(out), "--quick")
    assert code == 0, output
    assert statuses(report_in(out)) == dict.fromkeys(QUICK, "passed")


@pytest.mark.full
def test_everything_passes(tmp_path: Path) -> None:
    """Every check passes on two ranks."""
    out, num_ranks = tmp_path / "out", 2
    code, output = launch("torchrun", num_ranks, "--out", str(out), timeout_s=1800)
    assert code == 0, output
    report = report_in(out)
    assert statuses(report) == dict.fromkeys(FULL, "passed")
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("resume_zero2", "resume_zero3"):
        numbers = checks[name]["numbers"]
        assert numbers["resumed_on"] == num_ranks // 2
        assert 2 <= numbers["resumed_at_step"] < 7
    assert checks["save"]["numbers"]["total_s"] >= checks["save"]["numbers"]["stall_s"] > 0
    assert checks["speed"]["numbers"]["tflops_per_rank"] > 0
    assert any("gives the same logits" in line for line in checks["export"]["numbers"]["lines"])


@pytest.mark.full
def test_one_rank_reports_that_no_communication_was_checked(tmp_path: Path) -> None:
    """With one rank no link is measured, and the table says so."""
    out = tmp_path / "out"
    code, output = launch("plain", 1, "--out", str(out), "--quick")
    assert code == 0, output
    assert statuses(report_in(out)) == dict.fromkeys(QUICK[:2], "passed")
    code, output = launch("plain", 1, "--table", str(out / "report.json"))
    assert code == 0
    assert "nothing between ranks" in output


@pytest.mark.full
def test_own_configuration(tmp_path: Path) -> None:
    """Overrides are compared on all ranks and on one; here they are those of the generated run itself."""
    first, out = tmp_path / "first", tmp_path / "out"
    assert launch("plain", 1, "--out", str(first), "--quick", "--minutes", "0.01")[0] == 1
    configs = first / "materials" / "configs"
    own = ["model/language_model=accept", "model/vision_tower=accept", "mixture=accept", "stage.init_from=null"]
    own += [f"data.store_root={first / 'materials' / 'stores'}", "stage.batch_size=5", "device=cpu"]
    code, output = launch("torchrun", 2, "--out", str(out), "--quick", "--config-dir", str(configs), "--", *own)
    assert code == 0, output
    check = report_in(out)["checks"][-1]
    assert (check["name"], check["status"], check["numbers"]["steps"]) == ("own", "passed", 3)


@pytest.mark.full
def test_without_time_no_check_passes(tmp_path: Path) -> None:
    """Without remaining time nothing runs, and the verdict says so."""
    out = tmp_path / "out"
    code, output = launch("plain", 1, "--out", str(out), "--quick", "--minutes", "0.01")
    assert code == 1, output
    report = report_in(out)
    assert set(statuses(report).values()) == {"not run"}
    assert report["passed"] is False
    assert report["verdict"].startswith("accept: INCOMPLETE")


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "reason"), [("larger", "grad_norm differs"), ("late", "has been in step 1, micro-step 0, backward")]
)
def test_faulty_runs_fail(tmp_path: Path, fault: str, reason: str) -> None:
    """With a gradient that is wrong by one percent, or a rank that hangs, the verdict is FAILED with the reason, and
    the other checks still run."""
    out = tmp_path / "out"
    path = os.pathsep.join([str(FAULTS), str(ROOT)])
    code, output = launch(
        "torchrun", 2, "--out", str(out), "--quick", "--timeout-s", "30", PYTHONPATH=path, ACCEPT_FAULT=fault
    )
    assert code == 1, output
    report = report_in(out)
    assert statuses(report) == {"one_rank": "passed", "zero3": "failed", "links": "passed", "hardware": "passed"}
    assert report["verdict"].startswith("accept: FAILED: 1 of 4 checks (zero3)")
    assert report["verdict"] in output
    assert reason in report["checks"][1]["reason"]


@pytest.mark.full
def test_two_hosts(tmp_path: Path, hosts: tuple[list[str], list[str]]) -> None:  # noqa: F811
    """Two ranks on each of two hosts with names and a network of their own: child runs communicate across it, and the
    hardware file has the links inside a host and the network between them."""
    spaces, links = hosts
    out, hidden = tmp_path / "out", ("SLURM_PROCID", "DS_ACCELERATOR")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"WORLD_SIZE": "4", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29871", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(4):
        host = rank // 2
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "GLOO_SOCKET_IFNAME": links[host]}
        command = f'hostname node{host} && exec "{sys.executable}" -m train.accept --out "{out}" --quick'
        words = ["ip", "netns", "exec", spaces[host], "unshare", "--uts", "sh", "-c", command]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(words, cwd=ROOT, env=env | own, start_new_session=True, **pipes))
    ended = [finish(process, 900) for process in processes]
    assert [code for code, _ in ended] == [0] * 4, ended
    report = report_in(out)
    assert report["nodes"] == [{"host": "node0", "ranks": 2}, {"host": "node1", "ranks": 2}]
    assert "2 x 2 CPU (4 ranks" in report["verdict"]
    measured = report["checks"][-1]["numbers"]["measured"]
    assert {"link_gb_s", "link_latency_us", "network_gb_s", "network_latency_us"} <= measured.keys()
    assert measured["gpus_per_node"] == 2
