"""Tests of saves that are written beside the next steps: what they write, and what stops them."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_next.config import LoraConfig
from tests.ranks import run_to_the_end
from tests.train import cases, fault_runs, save_cases
from tests.train.conftest import StartRanks
from train.checkpoint import saver as checkpoint
from train.checkpoint.background_copy import MemoryNeed, find_shortage
from train.checkpoint.host_copy import HostCopy, HostMemory
from train.config.schema import RunConfig, SaveConfig
from train.distributed.world import World

full = pytest.mark.full


class Scale:
    """An object that is neither a container nor a tensor."""

    def __init__(self) -> None:
        self.value = 2.0


def saved_size(content: Any) -> int:
    """The bytes that torch.save writes of it."""
    file = io.BytesIO()
    torch.save(content, file)
    return len(file.getvalue())


def test_copy_is_of_the_moment() -> None:
    """Later changes of tensors, containers and objects do not reach the copy; types, shapes and bits are the same."""
    weight = torch.randn(4, 6)
    content = {
        "module": {"weight": weight, "tied": weight, "turned": weight.T, "none": None},
        "groups": [{"lr": 0.5, "betas": (0.9, 0.95)}],
        "state": {0: {"step": torch.tensor(3.0), "half": torch.randn(5).bfloat16(), "flag": torch.tensor([True])}},
        "empty": [torch.empty(0, dtype=torch.bfloat16), torch.empty(0)],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scale": Scale(),
        "type": torch.float16,
    }
    file = io.BytesIO()
    torch.save(content, file)
    copy = HostCopy(content, HostMemory(2**16))
    weight.zero_()
    content["groups"][0]["lr"] = 0.0  # type: ignore[index]
    content["scale"].value = 0.0  # type: ignore[attr-defined]
    file.seek(0)
    expected = torch.load(file, weights_only=False)
    restored = copy.restore()
    assert save_cases.differences(restored, expected) == []
    assert restored["module"]["tied"] is restored["module"]["weight"]


def test_copy_of_a_view_has_its_elements_only() -> None:
    """Views of a large buffer, at any place of the memory or beyond it, are saved with their own bytes alone."""
    flat = torch.arange(2.0**18)
    views = [flat[10:20], flat[100:103], flat[1000:].view(-1, 2)[::1000]]
    assert saved_size(views) > 2**20
    for size in (0, 64, 128, 2**16):
        restored = HostCopy(views, HostMemory(size)).restore()
        assert save_cases.differences(restored, [view.clone() for view in views]) == []
        assert saved_size(restored) < 2**14


def test_memory_is_used_again() -> None:
    """After a reset the next copy has the same addresses."""
    memory = HostMemory(2**12)
    found = []
    for number in range(2):
        memory.reset()
        restored = HostCopy([torch.full((7,), float(number)), torch.ones(3)], memory).restore()
        assert restored[0].tolist() == [number] * 7
        found.append([tensor.data_ptr() for tensor in restored])
    assert found[0] == found[1]


GIB = 2**30
ALONE = World(0, 0, 1, torch.device("cpu"), torch.float32, None)


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ([("a", 3, 10), ("a", 4, 10), ("b", 7, 10)], ()),
        ([("a", 3, 10), ("b", 4, 20), ("b", 4, 10)], ("the 2 rank(s) of b would need 8.0 GiB", "10.0 GiB are free")),
        ([("a", 1, 1)], ("1 rank(s) of a", "1.0 GiB are free, of which 70%")),
    ],
)
def test_shortage_of_host_memory_is_named(needs: Sequence[tuple[str, int, int]], words: Sequence[str]) -> None:
    """The ranks of a host share its memory; a host where the copies do not fit is named with both numbers."""
    text = find_shortage([MemoryNeed(host, needed * GIB, free * GIB) for host, needed, free in needs])
    assert bool(text) == bool(words)
    for word in words:
        assert word in text


LORA = {"language_model": LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))}


@pytest.mark.parametrize(
    ("num_ranks", "stage", "lora"),
    [
        (2, 2, False),
        (2, 3, False),
        *(pytest.param(ranks, stage, False, marks=full) for ranks, stage in ((1, 0), (1, 2), (2, 0), (2, 1), (3, 3))),
        pytest.param(2, 2, True, marks=full),
    ],
)
def test_background_save_equals_a_blocking_one(
    start_ranks: StartRanks, run_config: RunConfig, num_ranks: int, stage: int, lora: bool
) -> None:
    """Every file of a checkpoint that was written after a further step has the tensors and values of a blocking save,
    bit for bit. The planned size is that of the files, and the second save uses the memory of the first."""
    if lora:
        pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")
    config = replace(run_config, engine=cases.zero(stage), save=SaveConfig(every=1), lora=LORA if lora else None)
    results = start_ranks(num_ranks).run(save_cases.save_both_ways, config)
    for result in results:
        assert "is written beside the next steps" in result["sentence"]
        assert result["reused"]
    assert results[0]["changed"]  # weights are gathered on rank 0
    blocking, background = (config.run_dir / kind / "step_000001" for kind in ("blocking", "background"))
    expected, actual = save_cases.contents(blocking), save_cases.contents(background)
    assert len(expected) == 1 + num_ranks * (stage > 0) + (num_ranks - 1) * (stage == 3)
    assert save_cases.differences(actual, expected) == []
    assert checkpoint.corrupt_files(background) == ""
    size, planned = (
        sum(path.stat().st_size for path in background.rglob("*.pt")),
        sum(result["planned"] for result in results),
    )
    assert planned <= size <= 1.01 * planned + 2**20


def test_full_disk_ends_all_ranks_with_one_sentence(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """If the thread of one rank cannot write, every rank raises the same sentence with that rank and its error, and the
    previous checkpoint is the newest."""
    config = replace(run_config, save=SaveConfig(every=1))
    first, second = start_ranks(2).run(save_cases.save_with_full_disk, config, 1)
    assert first == second
    folder = config.run_dir / "checkpoints"
    assert f"{folder / 'step_000002'} could not be saved: rank 1 (" in first
    assert "No space left on device" in first
    assert f"the newest complete checkpoint is {folder / 'step_000001'}. " in first
    assert checkpoint.list_complete(folder) == [folder / "step_000001"]


@pytest.mark.parametrize("change", ["own file", "other interface"])
def test_other_deepspeed_saves_by_itself(start_ranks: StartRanks, run_config: RunConfig, change: str) -> None:
    """A DeepSpeed that does not use the checkpoint engine is found at the start: one sentence has its version and what
    it did, its own engine stays, and no file is left."""
    for sentence, engine in start_ranks(2).run(save_cases.save_with_other_deepspeed, run_config, change):
        assert sentence.startswith("each save stalls training until DeepSpeed has written it: DeepSpeed 0.")
        assert {"own file": "_optim_states.pt without it", "other interface": "write_shards"}[change] in sentence
        assert engine == "TorchCheckpointEngine"


@full
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_write_that_hangs_ends_the_run(run_config: RunConfig, tmp_path: Path, stage: int) -> None:
    """If a thread's write does not return, the run ends after timeout_s and names rank and checkpoint."""
    config = replace(run_config, engine=cases.zero(stage), save=SaveConfig(every=1), timeout_s=10)
    rank = 0 if stage == 0 else 1
    args = (config, rank, 3600.0)
    ended = run_to_the_end(2, save_cases.run_with_slow_write, *args, folder=tmp_path, timeout_s=200)
    assert [each.exit_code for each in ended] == [1, 1], ended
    report = fault_runs.read_exit_report(config)
    assert report["reason"].startswith(f"rank {rank} (")
    assert (
        f"has written nothing of {config.run_dir / 'checkpoints' / 'step_000001'} for timeout_s=10" in report["reason"]
    )
    assert (report["rank"], report["phase"]) == (rank, "save")
    assert checkpoint.list_complete(config.run_dir / "checkpoints") == []


@full
def test_slow_write_is_no_hang(run_config: RunConfig, tmp_path: Path) -> None:
    """A write that takes longer than timeout_s but makes progress ends no run: training waits for it at the next save
    and at the end, the wait is reported, and the result is complete."""
    config = replace(run_config, save=SaveConfig(every=2), timeout_s=8)
    args = (config, 0, 0.05)
    [ended] = run_to_the_end(1, save_cases.run_with_slow_write, *args, folder=tmp_path, timeout_s=200)
    assert ended.exit_code == 0, ended.output
    assert "stalled training for" in ended.output
    lines = fault_runs.metrics(config)
    assert lines[2]["perf/save_s"] < 8 < total_save_s(config)
    assert checkpoint.latest_valid(config.run_dir / "checkpoints", ALONE) is not None


def total_save_s(config: RunConfig) -> float:
    """The seconds from the start of the first save to its commit, from the log."""
    log = (config.run_dir / "log" / "rank_000.log").read_text()
    [line, *_] = [line for line in log.splitlines() if "is complete; saving took" in line]
    return float(line.split("saving took")[1].split()[0])
