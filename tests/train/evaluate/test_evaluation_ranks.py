"""Tests of an evaluation on several ranks: the results are those of one rank, and an error on one ends all."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from llava_next.config import ModelError
from tests.tiny import tiny_samples, tiny_store
from tests.train.evaluate.learned import ALONE, Learned
from train.distributed.world import World
from train.evaluate import evaluation_ranks
from train.evaluate.evaluation_ranks import EvaluationError, EvaluationRanks, explain_out_of_memory

_Value = TypeVar("_Value")
NUM_RANKS = 3


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[EvaluationRanks], Any]], list[Any]]:
    """Runs a function on three ranks, which are threads here; returns the value or the error of each."""
    barrier = threading.Barrier(NUM_RANKS)
    exchanged: list[Any] = [None] * NUM_RANKS

    def gather(world: World, value: _Value) -> list[_Value]:
        exchanged[world.rank] = value
        barrier.wait(60)
        values = list(exchanged)
        barrier.wait(60)
        return values

    def start(function: Callable[[EvaluationRanks], Any]) -> list[Any]:
        monkeypatch.setattr(evaluation_ranks, "all_gather_objects", gather)
        results: list[Any] = [None] * NUM_RANKS

        def run(rank: int) -> None:
            world = World(rank, rank, NUM_RANKS, torch.device("cpu"), torch.float32, None)
            try:
                results[rank] = function(EvaluationRanks(world))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(NUM_RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return start


def test_items_are_divided(on_ranks: Callable[..., list[Any]]) -> None:
    """Each item is computed once, on one rank, and every rank has all values in the order of the items."""
    computed: list[int] = []

    def square(number: int) -> int:
        computed.append(number)
        return number * number

    for num_items in (0, 2, 10):
        computed.clear()
        expected = [number * number for number in range(num_items)]
        args: dict[str, Any] = {"description": "numbers", "unit": "number"}
        assert on_ranks(lambda ranks: ranks.map(square, range(num_items), **args)) == [expected] * NUM_RANKS  # noqa: B023
        assert sorted(computed) == list(range(num_items))
        assert ALONE.map(square, range(num_items), **args) == expected


@pytest.mark.parametrize("error", [ModelError("no such model"), ValueError("a bad number")])
def test_an_error_on_one_rank_ends_all(on_ranks: Callable[..., list[Any]], error: Exception) -> None:
    """Every rank raises, so none waits: a user's mistake as it is, another error with the rank that it came from."""

    def fail(ranks: EvaluationRanks) -> None:
        if ranks.world.rank == 1:
            raise error

    results = on_ranks(lambda ranks: ranks.run(lambda: fail(ranks)))
    assert results[1] is error
    for result in (results[0], results[2]):
        if isinstance(error, ModelError):
            assert str(result) == "no such model"
        else:
            assert isinstance(result, EvaluationError)
            assert str(result).startswith("rank 1 (")
            assert str(result).endswith("ValueError: a bad number")


def test_other_errors_are_not_explained() -> None:
    """Only out of memory is explained."""
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), explain_out_of_memory("a row", "--max-tokens (1)"):
        raise RuntimeError("shapes differ")
    with (
        pytest.raises(EvaluationError, match=r"^a row did not fit into memory: lower --max-tokens \(1\)\. Original"),
        explain_out_of_memory("a row", "--max-tokens (1)"),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


@pytest.mark.full
def test_two_ranks_give_the_results_of_one(learned: Learned, tmp_path: Path) -> None:
    """`torchrun -m train.evaluate`: the same bytes in both files, with several rows and batches, text-only sources
    included."""
    tiny_store(tmp_path, "images", tiny_samples(12))
    tiny_store(tmp_path, "chats", tiny_samples(5, pictures=False))
    arguments = [str(learned.export), "--store", str(tmp_path / "images"), "--store", str(tmp_path / "chats")]
    arguments += ["--max-tokens", "400", "--batch-size", "3", "--max-new-tokens", "4"]
    torchrun = str(Path(sys.executable).parent / "torchrun")
    results = []
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [torchrun, "--standalone", "--nproc-per-node", "2"]),
    ):
        out = tmp_path / f"{name}.json"
        command = [*launcher, "-m", "train.evaluate", *arguments, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1
        results.append((json.loads(out.read_text()), out.with_suffix(".answers.jsonl").read_text()))
    assert results[0] == results[1]
    assert results[0][0]["by_source"]["images"]["num_answers"] > 6
