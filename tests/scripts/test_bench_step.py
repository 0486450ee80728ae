"""The step benchmarks run on a tiny model, and fail where a competitor has done other work."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_next.cache_root import cache_root
from tests.tiny import tiny_tokenizer

Bench = Callable[[str], Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one of Vicuna's kind."""
    return tiny_tokenizer(tmp_path_factory.mktemp("bench") / "tokenizer", "metaspace")


def tiny_job(bench: Bench, **changes: Any) -> Any:
    """Two steps of four samples."""
    job = bench("training_step.job").Job(samples_per_step=4, num_steps=2, max_tokens=400)
    return replace(job, **changes)


@pytest.mark.full
def test_step_bench_of_sets(bench: Bench, tokenizer: Path) -> None:
    """Single images and sets: ours and a stock LLaVA-OneVision have equal first losses and count the same tokens."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: ./scripts/setup.sh --extras bench")
    step, runs = bench("training_step.on_cpu"), bench("training_step.competitors")
    materials = bench("training_step.materials")
    with materials.prepared(materials.SHAPES["tiny_sets"], tokenizer, tiny_job(bench)) as job:
        records = json.loads((Path(job.folder) / "raw" / "records.json").read_text())
        outcomes = runs.run_all([step.OURS, step.STOCK_1, step.STOCK_4], job)
    sets = [record["image"] for record in records if isinstance(record["image"], list)]
    assert sorted(len(images) for images in sets) == [2, 3, 4, 6]
    runs.check_same_work(outcomes)


@pytest.mark.full
def test_step_bench(
    bench: Bench, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours and stock have equal first losses; on other samples the benchmark fails and names the competitor."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: ./scripts/setup.sh --extras bench")
    step, runs = bench("training_step.on_cpu"), bench("training_step.competitors")
    materials = bench("training_step.materials")
    with materials.prepared(materials.SHAPES["tiny"], tokenizer, tiny_job(bench)) as job:
        outcomes = runs.run_all([step.OURS, step.STOCK_4], job)
        records = Path(job.folder) / "raw" / "records.json"
        changed = json.loads(records.read_text())
        changed[0]["conversations"][1]["value"] = changed[1]["conversations"][1]["value"] + " red"
        records.write_text(json.dumps(changed))
        others = {"ours": outcomes["ours"], **runs.run_all([step.STOCK_4], job)}
    ours, stock = outcomes["ours"], outcomes["stock-4"]
    assert ours.losses == pytest.approx(stock.losses, rel=1e-4)
    assert ours.num_supervised == stock.num_supervised
    with pytest.raises(runs.BenchError, match="stock-4"):
        runs.check_same_work(others)

    answers = {"ours": ours, "stock-4": stock}
    monkeypatch.setattr(runs.Competitor, "run", lambda self, job: answers[self.name])
    arguments = ["--shape", "tiny", "--quick", "--threads", "1", "--only", "ours", "stock-4"]
    arguments += ["--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    assert bench("step").main(["cpu", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "peak memory, stock at batch 4" in printed
    results = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [each["what"] for each in results["comparisons"]] == [each.what for each in step.COMPARISONS[:2]]
    assert 0 < results["head_share"] < results["head_share_at_every_position"] < 1
    assert f"{results['head_share']:.1%} of the FLOPs of our step" in printed
    assert 0 < results["competitors"]["ours"]["share_of_gemm"] < 1
    answers["stock-4"] = others["stock-4"]
    assert bench("step").main(["cpu", *arguments]) == 1
    assert "stock-4" in capsys.readouterr().err


def test_head_shares(bench: Bench) -> None:
    """The head's FLOPs as a share of the step's, and of a step with the head at all of its tokens, not only at the
    supervised ones."""
    outcome = bench("training_step.job").Outcome
    ours = outcome(flops=[100.0, 100.0], head_flops=[10.0, 10.0], num_tokens=[40, 20], num_supervised=[10, 10])
    shares = bench("training_step.competitors").head_shares(ours)
    assert shares == {"head_share": 0.1, "head_share_at_every_position": 60.0 / (180.0 + 60.0)}


def test_the_cpu_bench_runs_the_wide_model(bench: Bench) -> None:
    """In the narrow one the head at every position, which only the others compute, is most of the work."""
    assert bench("training_step.on_cpu")._options([]).shape == "wide"


def test_different_work_is_an_error(bench: Bench) -> None:
    """A loss that differs by more than the tolerance, that is no number, or that is a mean of other tokens."""
    runs, outcome = bench("training_step.competitors"), bench("training_step.job").Outcome
    reference = outcome(losses=[10.0, 9.0], num_supervised=[7, 8])
    runs.check_same_work({"ours": reference, "theirs": outcome(losses=[10.0009, 5.0], num_supervised=[7, 8])})
    for losses, counts in (([10.002, 9.0], [7, 8]), ([float("nan"), 9.0], [7, 8]), ([10.0, 9.0], [7, 9])):
        with pytest.raises(runs.BenchError, match="theirs"):
            runs.check_same_work({"ours": reference, "theirs": outcome(losses=losses, num_supervised=counts)})


def test_a_competitor_that_fails_ends_the_bench(bench: Bench, tmp_path: Path) -> None:
    """The end of its output is in the error."""
    runs = bench("training_step.competitors")
    with pytest.raises(runs.BenchError, match=r"stock-3 ended with exit code 1:[\s\S]*model"):
        runs.Competitor("stock-3", "stock", batch=3).run(tiny_job(bench, folder=str(tmp_path)))


@pytest.mark.full
def test_gpu_bench_without_a_gpu(bench: Bench, tokenizer: Path, tmp_path: Path) -> None:
    """The whole program on a tiny model: first losses compared, MFU of the given rate."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: ./scripts/setup.sh --extras bench")
    arguments = ["--device", "cpu", "--tiny", "--samples", "4", "--steps", "3", "--batches", "2", "--workers", "0"]
    arguments += ["--threads", "1", "--max-tokens", "400", "--peak-tflops", "1", "--variants", "plain", "--profile"]
    arguments += ["--stock", "sdpa", "flash_attention_2"]
    assert bench("step").main(["gpu", *arguments, "--tokenizer", str(tokenizer), "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    competitors = results["competitors"]
    assert 0 < results["head_share"] < results["head_share_at_every_position"] < 1
    assert list(competitors) == ["ours, plain", "stock sdpa, batch 2"]
    if importlib.util.find_spec("flash_attn") is None:
        assert results["not_run"] == {"stock flash_attention_2, batch 2": "the package flash_attn is not installed"}
    assert 0 < competitors["ours, plain"]["mfu"] < 1
    assert 0 < competitors["ours, plain"]["tower_share_of_time"] < 1


@pytest.mark.gpu
@pytest.mark.full
def test_gpu_bench_on_a_gpu(bench: Bench, tokenizer: Path, tmp_path: Path) -> None:
    """The same on a device: bf16, varlen attention, worker processes."""
    arguments = ["--tiny", "--samples", "4", "--steps", "3", "--batches", "2", "--workers", "1", "--max-tokens", "400"]
    arguments += ["--peak-tflops", "100", "--profile", "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    assert bench("step").main(["gpu", *arguments]) == 0


@pytest.mark.full
def test_the_authors_trainer_does_the_same_work(bench: Bench) -> None:
    """Their first loss equals ours, with both towers frozen."""
    runs, step = bench("training_step.competitors"), bench("training_step.on_cpu")
    materials = bench("training_step.materials")
    tokenizer = cache_root() / "tokenizer_vicuna"
    if step.AUTHORS_4.missing_requirement or not tokenizer.is_dir():
        pytest.skip(step.AUTHORS_4.missing_requirement or f"there is no {tokenizer}: ./scripts/oracles.sh")
    with materials.prepared(materials.SHAPES["tiny"], tokenizer, tiny_job(bench)) as job:
        runs.check_same_work(runs.run_all([step.OURS_FROZEN, step.AUTHORS_4], job))


def test_layers_that_fit_on_a_card(bench: Bench) -> None:
    """More memory fits more layers, longer rows fewer; an 80 GB card fits about a third of a 7B."""
    gpu, large = bench("training_step.on_gpu"), bench("training_step.materials").SHAPES["large"]
    on_80 = gpu.layers_that_fit(80e9, 8192, large)
    assert 8 <= on_80 <= 14
    assert gpu.layers_that_fit(141e9, 8192, large) > on_80 > gpu.layers_that_fit(80e9, 16384, large)
    assert gpu.layers_that_fit(80e9, 8192, large, recompute=True) > on_80
    assert gpu.result_name("NVIDIA H100 80GB HBM3") == "gpu_h100"
    assert gpu.result_name("NVIDIA H100 PCIe") == "gpu_h100_pcie"
    assert gpu.result_name("NVIDIA T4") == "gpu"


def test_samples_are_drawn_alike(bench: Bench) -> None:
    """The same seed gives the same bytes, another seed others; what is not accepted is not drawn."""
    draw = bench("training_step.drawn_samples").draw_samples
    samples = [draw(3, seed, lambda messages, sizes: sizes[0][1] > sizes[0][0], shrink=8) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    with pytest.raises(ValueError, match="0 of 1"):
        draw(1, 0, lambda messages, sizes: False)


@pytest.mark.parametrize("words", [[], ["cqu"], ["cpu", "--steps", "1"], ["cpu", "--no-such-option"]])
def test_mistake_is_one_sentence(bench: Bench, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and no usage."""
    try:
        code = bench("step").main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
