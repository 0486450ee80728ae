"""Tests of the verdict, the report, the "Verified on" table, the hardware file, and the comparison of runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from train.accept import main
from train.acceptance.check_report import (
    Check,
    Status,
    format_verdict,
    format_verified_table,
    has_passed,
    list_report_files,
    write_report,
)
from train.acceptance.compare_runs import TOLERANCES, compare_runs
from train.acceptance.measured_hardware import convert_links, select_base_hardware, write_hardware
from train.config.schema import ConfigError
from train.plan.communication import LINK_SHARE, estimate_ring
from train.plan.hardware import check_hardware

ROOT = Path(__file__).resolve().parents[3]


def checks(*statuses: Status) -> list[Check]:
    """Returns one check for each status."""
    return [Check(f"check{number}", "a with b", status) for number, status in enumerate(statuses)]


@pytest.mark.parametrize(
    ("statuses", "word", "is_passed"),
    [
        (("passed", "passed"), "PASSED", True),
        (("passed", "failed", "not run"), "FAILED", False),
        (("passed", "not run"), "INCOMPLETE", False),
        ((), "INCOMPLETE", False),
    ],
)
def test_verdict(statuses: Sequence[Status], word: str, is_passed: bool) -> None:
    """The verdict is PASSED only if every check was run and passed."""
    result = checks(*statuses)
    line = format_verdict(result, {"NVIDIA H100": 16}, 2, quick=False)
    assert line.startswith(f"accept: {word}")
    assert "2 x 8 NVIDIA H100 (16 ranks)" in line
    assert has_passed(result) is is_passed
    assert all(check.name in line for check in result if check.status == "failed")


def test_report_replaces_names(tmp_path: Path) -> None:
    """Names of hosts and folders are replaced in every text, but not within longer words."""
    result = [Check("a", "", "failed", numbers={"of vm": ["/x/out/runs"]}, reason="rank 1 (vm), not vmlinux: /x/out/l")]
    write_report(tmp_path / "report.json", result, {"devices": {"CPU": 1}}, {"vm": "host0", "/x/out": "DIR"})
    text = (tmp_path / "report.json").read_text()
    assert "rank 1 (host0), not vmlinux" in text
    assert "/x/out" not in text
    report = json.loads(text)
    assert report["passed"] is False
    assert report["checks"][0]["numbers"] == {"of host0": ["DIR/runs"]}


def report_of(statuses: Sequence[Status], **changes: Any) -> dict[str, Any]:
    """Returns the parts of a report that the table reads."""
    about: dict[str, Any] = {
        "ranks": 4,
        "nodes": [{"host": "a", "ranks": 4}],
        "devices": {"CPU": 4},
        "launcher": "torchrun",
    }
    about |= {"versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "code": "abc"}}
    names = [{"name": check.name, "status": check.status} for check in checks(*statuses)]
    return {"accept": 1, "when": "2026-11-30T10:00:00+00:00", **about, "checks": names, **changes}


def test_table_lists_what_was_covered(tmp_path: Path) -> None:
    """Only passed checks count as covered; for a single GPU the table says that no communication was tested."""
    (tmp_path / "a.json").write_text(json.dumps(report_of(("passed", "failed", "not run"))))
    (tmp_path / "b.json").write_text(json.dumps(report_of(("passed",), ranks=1, devices={"NVIDIA H200": 1})))
    rows = format_verified_table(
        list_report_files([tmp_path, ROOT / "scripts/bench/results/gpu_h100.json"])
    ).splitlines()[2:]
    assert len(rows) == 3
    assert all(word in rows[0] for word in ("4 x CPU", "1 passed, 1 failed, 1 not run", " check0 ", "2026-11-30"))
    assert "nothing between ranks" in rows[1]
    assert "NVIDIA H100" in rows[2]
    assert "nothing between ranks" in rows[2]
    assert "no checks" in rows[2]


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"accept": 1}', '{"accept": 99}'])
def test_table_refuses_other_files(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Other files are an error with exit code 2 and the name of the file."""
    file = tmp_path / "other.json"
    file.write_text(text)
    assert main(["--table", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- hardware


def links(num_hosts: int) -> dict[str, Any]:
    """Returns measured links: 300 GB/s inside a host and 40 between two, by the slower collective and the largest
    message."""

    def group(num_ranks: int, gb_s: float, latency_us: float) -> dict[str, Any]:
        sizes = [{"bytes": 1, "seconds": 1.0, "gb_s": 0.1}, {"bytes": 2, "seconds": 1.0, "gb_s": gb_s}]
        faster = [{**size, "gb_s": 2 * size["gb_s"]} for size in sizes]
        return {"num_ranks": num_ranks, "latency_us": latency_us, "all_gather": faster, "reduce_scatter": sizes}

    return {"num_hosts": num_hosts, "groups": {"one_host": group(8, 300.0, 2.0), "all_ranks": group(16, 40.0, 4.0)}}


def test_planner_uses_the_measurements(tmp_path: Path) -> None:
    """A ring over two nodes takes the time that the measured rate and latency give; other keys are the base file's."""
    base = select_base_hardware(None, "NVIDIA H100 80GB HBM3", 79.1)
    assert base == "h100_80g"
    measured = convert_links(links(2)) | {"gpus_per_node": 8}
    write_hardware(tmp_path / "mine.yaml", base, measured, "8 x NVIDIA H100")
    text = (tmp_path / "mine.yaml").read_text()
    hardware = check_hardware(yaml.safe_load(text))
    assert hardware.name == "mine"
    assert estimate_ring(1e9, hardware, 2) == pytest.approx(15 / 16 / 40.0 + 15 * 4.0e-6, rel=1e-3)
    assert estimate_ring(1e9, hardware, 1) == pytest.approx(7 / 8 / 300.0 + 7 * 2.0e-6, rel=1e-3)
    assert hardware.bf16_tflops == 989
    remarks = {line.partition(":")[0] for line in text.splitlines() if "# measured" in line}
    assert remarks == measured.keys()
    assert "h100_80g" in text


def test_one_node_measures_no_network() -> None:
    """With one node, only the link inside the host is measured."""
    result = convert_links({"num_hosts": 1, "groups": {"one_host": links(1)["groups"]["one_host"]}})
    assert result == {"link_gb_s": pytest.approx(300.0 / LINK_SHARE), "link_latency_us": 2.0}


@pytest.mark.parametrize(
    ("name", "device", "value"), [("a1000", "CPU", "a1000"), (None, "NVIDIA X1", "NVIDIA X1"), (None, "CUDA", "CUDA")]
)
def test_an_unknown_machine_needs_a_base(name: str | None, device: str, value: str) -> None:
    """A missing file, or a device without a file, is an error with its name."""
    with pytest.raises(ConfigError, match=value):
        select_base_hardware(name, device, 96.0)
    assert select_base_hardware("a100_80g", "NVIDIA X1", 96.0) == "a100_80g"
    assert select_base_hardware(None, "CPU", 0.0) == "cpu"


# ----------------------------------------------------------------------------------------------- comparison


def write_run(folder: Path, *, loss: float = 2.0, norm: float = 1.0, steps: int = 3, scale: float = 1.0,
              samples: int = 8, key_bias: float = 0.1) -> Path:  # fmt: skip
    """Writes a run of three steps with an export of three tensors."""
    (folder / "export").mkdir(parents=True)
    line = {"train/loss": loss, "train/grad_norm": norm, "train/samples": samples}
    line |= {f"train/{key}": 1 for key in ("supervised_tokens", "input_tokens", "tiles")}
    text = "".join(json.dumps({"step": step, **line}) + "\n" for step in range(steps))
    (folder / "metrics.jsonl").write_text(text)
    weights = torch.linspace(-1, 1, 12) * scale
    tensors = {"model.a.weight": weights, "model.a.k_proj.bias": torch.full((3,), key_bias), "zero": torch.zeros(2)}
    save_file(tensors, folder / "export" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"key_bias": 0.2}, ""),
        ({"loss": 2.0 * (1 + 1e-6)}, ""),
        ({"loss": 2.0 * (1 + 1e-4)}, "loss differs"),
        ({"loss": None}, "loss differs"),
        ({"norm": 1.001}, "grad_norm differs"),
        ({"scale": 1 + 1e-4}, "weights differs"),
        ({"scale": float("nan")}, "weights differs"),
        ({"steps": 2}, "2 steps"),
        ({"samples": 7}, "train/samples"),
    ],
)
def test_comparison(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """Rounding differences are tolerated, key biases are not compared, and every other difference is reported."""
    ours, theirs = write_run(tmp_path / "ours", **changes), write_run(tmp_path / "theirs")
    result = compare_runs(ours, theirs, TOLERANCES, weights=True)
    assert (problem in result.problem) if problem else not result.problem, result
