"""The pages of `python -m train.report` show what is in the runs' files, and texts of the files remain text."""

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_recipes.schema.sample import Message, Sample
from tests.tiny import encode_noise_image, tiny_samples, tiny_store
from train.html.charts import Chart
from train.observability.run_folder import read_runs
from train.observability.suite_results import weights_fingerprint
from train.report.__main__ import main
from train.report.asked_questions import evaluation_questions
from train.report.comparison import UNKNOWN, compare
from train.report.curves import MAX_POINTS, charts_of, parts_of_time, series

CONFIG = {
    "name": "tiny",
    "seed": 0,
    "stage": {"name": "finetune", "learning_rates": {"projector": 1.0e-3}, "loss_weighting": "token"},
    "data": {"store_root": "nowhere"},
}
VERSIONS = {"python": "3.11.2", "torch": "2.13.0", "code": "8e221fc0aa11"}
EVIL = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)></title></style>\u202e\x00"

Make = Callable[..., Path]


def step(number: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "step": number,
        "train/loss": 8.0 / (1 + number),
        "train/loss/chats": 4.0,
        "train/loss/pictures": 9.0,
        "lr/projector": 1e-3,
        "train/grad_norm/projector": 0.5,
        "perf/step_s": 2.0,
        "perf/data_wait_s": 0.25,
        "perf/forward_backward_s": 1.5,
        "perf/tflops_per_rank": 494.5,
        **values,
    }


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes the folder of a run: its files by name, as values, lines of values or text."""

    def write(name: str, lines: Sequence[Any] = (), config: dict[str, Any] | None = None, **files: Any) -> Path:
        folder = tmp_path / "outputs" / name / "finetune"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {})))
        (folder / "metrics.jsonl").write_text(_lines(lines or [step(number) for number in range(3)]))
        for file, content in files.items():
            path = folder / file.replace("__", ".")
            path.write_text(_lines(content) if isinstance(content, list) else json.dumps(content))
        return folder

    return write


def _lines(values: Sequence[Any]) -> str:
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


class _Page(HTMLParser):
    """A parsed page: its tags, their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*runs: Path) -> _Page:
    """The page of these runs, at its default path."""
    assert main([str(run) for run in runs]) == 0
    folder = runs[0] if len(runs) == 1 else runs[0].parents[1]
    return _Page(folder / "report.html")


# ------------------------------------------------------------------------------------------------ the files


def test_damaged_lines_are_counted_and_the_others_kept(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that is cut off and one that is not an object are counted; of a step that was logged twice the last line
    counts; a file that is not JSON is named."""
    lines = [step(1), '{"step": 2, "train/lo', step(0), "7", step(1, **{"train/loss": 5.0}), {"note": "no step"}]
    folder = make("a", lines)
    (folder / "data.json").write_text("{")
    (run,) = read_runs([folder])
    assert [(line["step"], line["train/loss"]) for line in run.metrics] == [(0, 8.0), (1, 5.0)]
    assert run.remarks[0] == "metrics.jsonl: 2 damaged lines left out"
    assert run.remarks[1].startswith("data.json is damaged")
    page = page_of(folder)
    assert "a/finetune: metrics.jsonl: 2 damaged lines left out" in page.text
    assert "2 damaged lines" in capsys.readouterr().err


def test_a_mistake_is_one_sentence(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, with the mistake and its fix; nothing is written."""
    folder = make("a")
    empty = make("b", ["{"])
    for arguments, message in (
        ([tmp_path / "none"], "none does not exist"),
        ([tmp_path / "outputs" / "a"], "holds no config.yaml; inside it there are finetune; name"),
        ([tmp_path / "outputs"], "inside it there are a/finetune, b/finetune"),
        ([empty], r"has no finished step: .* \(metrics.jsonl: 1 damaged line left out\)"),
        ([folder, tmp_path / "outputs" / "b" / ".." / "a" / "finetune"], "is named twice"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert re.search(message, error), error
    assert not list(tmp_path.rglob("report.html*"))


def test_labels_are_the_fewest_parts_of_the_paths_that_are_unique(tmp_path: Path) -> None:
    """Name and stage, and more only where these are equal."""
    folders = [tmp_path / name for name in ("x/a/finetune", "x/b/finetune", "y/a/finetune")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("{}")
        (folder / "metrics.jsonl").write_text(_lines([step(0)]))
    assert [run.label for run in read_runs(folders[:2])] == ["a/finetune", "b/finetune"]
    assert [run.label for run in read_runs(folders)] == ["x/a/finetune", "x/b/finetune", "y/a/finetune"]


# ------------------------------------------------------------------------------------------- results tables


def test_results_tables_are_shown_with_published_values(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Results, published values and differences, and why there is none; texts of the file remain text. The table of a
    run whose export has been replaced is left out, with a remark."""
    columns = {
        "mme": {"title": "MME", "state": "done", "values": [1500.25, 300], "published": [1519, 332], "note": EVIL},
        "gqa": {"title": EVIL, "state": "skipped", "published": [64.2], "reason": EVIL},
    }
    folders = [make(name) for name in ("a", "b")]
    for folder in folders:
        (folder / "export").mkdir()
        (folder / "export" / "model.safetensors").write_bytes(b"weights")
        header = {"title": "Announced" + EVIL, "weights": weights_fingerprint(folder / "export"), "lmms_eval": "0.7.3"}
        suite = {**header, "compared_with": "Vicuna-7B", "source": "a page", "columns": columns}
        (folder / "suite_x.json").write_text(json.dumps(suite))
    (folders[1] / "export" / "model.safetensors").write_bytes(b"others")
    page = page_of(*folders)
    assert page.text.count("Results table: Announced") == 1
    for text in ("1500.2 / 300.0", "1519 / 332", "-18.8 / -32.0", "compared with Vicuna-7B (a page)", "skipped: "):
        assert text in page.text
    assert "script" not in page.tags
    assert "b/finetune: suite_x.json is left out: it is of other weights" in page.text
    assert "of other weights" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what differs


def test_differences_are_exactly_what_differs(make: Make) -> None:
    """Keys of the configuration, the data, versions and hardware, without the names of the runs."""
    start = {"step": 0, "ranks": 2, "device": "cpu", "dtype": "float32", "versions": VERSIONS}
    stage = {**CONFIG["stage"], "learning_rates": {"projector": 2.0e-3, "vision_tower": 1.0e-5}}  # type: ignore[dict-item]
    mixture = [{"source": "chats", "used": 1000}, {"source": "pictures", "used": 30}]
    data = {"data_fingerprint": "a" * 64, "mixture": mixture}
    first = make("one", starts__jsonl=[start], data__json=data)
    changed = {**start, "ranks": 4, "versions": {**VERSIONS, "torch": "2.12.0"}}
    data = {"data_fingerprint": "b" * 64, "mixture": [mixture[0], {"source": "pictures", "used": 40}]}
    second = make("two", config={"name": "two", "stage": stage}, starts__jsonl=[start, changed], data__json=data)
    third = make("three")
    assert compare(read_runs([first, second]))[0] == [
        ("configuration", "stage.learning_rates.projector", "0.001", "0.002"),
        ("configuration", "stage.learning_rates.vision_tower", "not there", "1e-05"),
        ("data", "data_fingerprint", "a" * 12, "b" * 12),
        ("data", "samples of pictures", "30", "40"),
        ("versions", "torch", "2.13.0", "2.12.0"),
        ("hardware", "ranks", "2", "4"),
    ]
    unknown = {name: tuple(values) for _, name, *values in compare(read_runs([first, third]))[0]}
    assert unknown["torch"] == ("2.13.0", UNKNOWN)  # what is not recorded is not equal


# ----------------------------------------------------------------------------------------- the order of a page


@pytest.mark.parametrize("num_runs", [1, 2])
def test_results_come_first(make: Make, tmp_path: Path, num_runs: int) -> None:
    """Losses, scores and questions with images; then curves; then, of several runs, what differs; then data and
    configuration."""
    tiny_store(tmp_path / "stores", "pictures", tiny_samples(2))
    scores = {"num_samples": 2, "loss": 1.25, "metric": "exact_match", "score": 0.75}
    runs = [
        make(
            name,
            config={"name": name, "seed": seed, "data": {"store_root": str(tmp_path / "stores")}},
            evaluation__json={"by_source": {"pictures": scores}, "all": {**scores, "score": 0.5}},
            evaluation__answers__jsonl=[_answer("pictures", "000001", "What is it?")],
            answers__jsonl=[_live(1, 0, "a word")],
        )
        for seed, name in enumerate(("one", "two")[:num_runs])
    ]
    headings = [
        *("Results", "Evaluation", "Questions and answers", "Answers during training", "Loss"),
        *("Learning rates and gradient", "Speed", "Time and memory"),
        *(["What differs"] if num_runs > 1 else []),
        *("Starts and resumes", "Steps left out", "Data", "Configuration"),
    ]
    page = page_of(*runs)
    assert re.findall(r"<h2>(.+?)</h2>", page.html) == headings
    assert page.html.index("data:image/jpeg") < page.html.index('class="chart"')
    assert page.text.index("50.0%") < page.text.index("75.0%")  # all sources, then each


def test_first_and_last_losses(make: Make) -> None:
    """Means of ten steps each: what the run has learned, in its first table."""
    losses = [8.0] * 10 + [5.0] * 10 + [2.0] * 10
    folder = make("a", [step(number, **{"train/loss": loss}) for number, loss in enumerate(losses)])
    assert "308.00002.0000" in re.sub(r"\s", "", page_of(folder).text)  # steps, first, last


# ------------------------------------------------------------------------------------------------ the curves


def test_a_long_run_is_thinned_without_hiding_a_step(make: Make) -> None:
    """Means of equal spans count every step once, and the band reaches from the lowest to the highest step."""
    losses = np.random.default_rng(0).normal(5.0, 1.0, 1000)
    folder = make("long", [step(number, **{"train/loss": loss}) for number, loss in enumerate(losses.tolist())])
    (line,) = _chart(charts_of(read_runs([folder])), "Loss").lines
    assert len(line.steps) == MAX_POINTS
    assert line.low is not None
    assert line.high is not None
    assert (line.low.min(), line.high.max()) == (losses.min(), losses.max())
    assert line.values.mean() == pytest.approx(losses.mean(), abs=0.01)
    assert ((line.low <= line.values) & (line.values <= line.high)).all()


def test_null_is_not_drawn(make: Make) -> None:
    """A loss that was not finite (null in the file) is not a point at 0."""
    folder = make("gap", [step(0), step(1, **{"train/loss": None}), step(2)])
    (run,) = read_runs([folder])
    assert series(run, "train/loss")[0].tolist() == [0.0, 2.0]


def test_spikes_are_marked_and_listed(make: Make) -> None:
    """The steps whose score reaches the run's threshold, in the chart of losses, as a table, and across the scores;
    an earlier run has neither."""
    scores = (None, 2.0, 30.0, 31.5, -3.0)
    lines = [step(number, **{"train/loss_spike_score": score} if score else {}) for number, score in enumerate(scores)]
    folder = make("a", lines, config={"spike_threshold": 30.0})
    charts = charts_of(read_runs([folder]))
    assert _chart(charts, "Loss").ticks == [(0, 2), (0, 3)]
    assert _chart(charts, "Distance from the losses before").level == (30.0, "spike_threshold=30")
    page = page_of(folder)
    assert "a/finetune22.666730.0" in re.sub(r"\s", "", page.text)
    assert "a/finetune32.000031.5" in re.sub(r"\s", "", page.text)
    assert page.html.count('class="tick run0"') == 2
    earlier = page_of(make("b"))
    assert "Distance from the losses before" not in earlier.text
    assert "spike at step" not in earlier.text


def test_labels_of_an_axis_are_unique(make: Make) -> None:
    """Also where all values are close together, very small or very large."""
    for name, base, spread in (("close", 6.3, 0.01), ("small", 2e-7, 1e-7), ("large", 4e6, 3e5)):
        folder = make(name, [{"step": number, "train/loss": base + spread * number} for number in range(4)])
        drawing = page_of(folder).html.partition("<svg")[2].partition("</svg>")[0]
        labels = re.findall(r'<text class="end"[^>]*>([^<]*)</text>', drawing)
        assert 4 <= len(labels) == len(set(labels))


def test_several_runs_share_charts(make: Make) -> None:
    """One run has all sources in one chart; two runs of different length have a chart of each source."""
    first, second = make("one"), make("two", [step(number) for number in range(5)])
    alone = charts_of(read_runs([first]))
    assert [line.label for line in _chart(alone, "Loss by source").lines] == ["chats", "pictures"]
    both = charts_of(read_runs([first, second]))
    by_name = (
        "Loss by source: chats",
        "Loss by source: pictures",
        "Learning rate: projector",
        "Norm by part: projector",
    )
    for title in ("Loss", *by_name):
        lines = _chart(both, title).lines
        assert [(line.run, line.steps.max()) for line in lines] == [(0, 2.0), (1, 4.0)]


def test_kinds_of_time_add_up_to_the_steps(make: Make) -> None:
    """The parts of a step add up to its seconds; saves and held-out losses come on top."""
    lines = [
        step(0),
        step(1, **{"perf/save_s": 3.0}),
        step(2, **{"perf/evaluate_s": 1.0, "perf/verify_s": 2.0}),
    ]
    (run,) = read_runs([make("a", lines)])
    sums = {name: values.sum() for name, (_, values) in parts_of_time(run).items()}
    assert sums == {
        "forward and backward (slowest rank)": 4.5,
        "waiting for data": 0.75,
        "rest of the step": 0.75,
        "verification": 2.0,
        "saves": 3.0,
        "held-out loss and answers": 1.0,
    }
    assert "3.0 s, 25.0%" in page_of(run.path).text


def test_resumes_are_marked_and_listed(make: Make) -> None:
    """A start at step 0 is not a resume; changed versions are named at the start that changed them."""
    start = {"step": 0, "time": "t0", "origin": "started afresh", "ranks": 2, "device": "cpu", "versions": VERSIONS}
    later = {**start, "step": 2, "time": "t1", "origin": "resumed", "versions": {**VERSIONS, "torch": "2.14.0"}}
    folder = make("a", starts__jsonl=[start, later])
    assert _chart(charts_of(read_runs([folder])), "Loss").marks == [(0, 2)]
    assert re.search(r"2t1resumed2cpu, torch 2\.14\.0", page_of(folder).text)
    assert "b/finetune has no starts.jsonl" in page_of(make("b")).text


def test_planned_memory_is_shown_beside_the_measured_one(make: Make) -> None:
    """That of the run's stage, in the table and across the curve; without a plan the page says how to get one."""
    stages = [
        {"stage": "align", "asked": {"memory_total_gib": 1.0}},
        {"stage": "finetune", "asked": {"memory_total_gib": 61.25}},
    ]
    lines = [step(0, **{"perf/max_memory_gib": 60.0})]
    folder = make("a", lines, plan__json={"stages": stages})
    assert _chart(charts_of(read_runs([folder])), "Memory of rank 0").level == (61.25, "planned: 61.2 GiB")
    assert "dashed: planned: 61.2 GiB" in page_of(folder).text
    assert "python -m train.plan ... --out RUN/plan.json" in page_of(make("b", lines)).text


def test_mfu_is_shown_where_the_run_logs_it(make: Make) -> None:
    """Without it, on a CPU or an unknown card, the page says why."""
    page = page_of(make("a", [step(number, **{"perf/mfu": 0.553}) for number in range(3)]))
    assert "55.3%" in page.text
    assert "share of the card's dense bf16 rate" in page.text
    page = page_of(make("b"))
    assert "No MFU for a run on a CPU" in page.text
    assert "share of the card's" not in page.text


def _chart(charts: dict[str, list[Chart]], title: str) -> Chart:
    return next(chart for each in charts.values() for chart in each if chart.title == title)


# ------------------------------------------------------------------------------------------------ the page


def _answer(source: str, name: str, text: str, answer: str = "4") -> dict[str, Any]:
    return {"source": source, "id": name, "text": text, "truth": "5", "answer": answer, "score": 0.0, "is_cut": False}


def test_questions_have_the_images_of_their_store(make: Make, tmp_path: Path) -> None:
    """A question of several runs is shown once, with the answer of each; a missing store is named."""
    tiny_store(tmp_path / "stores", "pictures", tiny_samples(6))
    data = {"store_root": str(tmp_path / "stores")}
    asked = [_answer("pictures", f"{number:06d}", f"What is {number}?") for number in range(6)]
    first = make("one", config={"data": data}, evaluation__answers__jsonl=[*asked, _answer("gone", "1", "And this?")])
    second = make("two", config={"data": data}, evaluation__answers__jsonl=[{**asked[3], "answer": "perhaps 5"}])
    questions = evaluation_questions(read_runs([first, second]), 4)
    assert sorted(each.source for each in questions) == ["gone", "pictures", "pictures", "pictures"]
    answers = [("one/finetune", "4  (score 0.00)"), ("two/finetune", "perhaps 5  (score 0.00)")]
    assert [each.facts[2:] for each in questions if each.id == "000003"] == [answers]
    reasons = [(each.images[0].url, each.images[0].why[:15]) for each in questions if each.source == "gone"]
    assert reasons == [(None, "there is no sto")]
    page = page_of(first, second)
    assert len({value for name, value in page.attributes if value.startswith("data:image/jpeg;base64,")}) == 7
    assert "No image: there is no store in" in page.text
    assert page.text.count("perhaps 5") == 1


@pytest.mark.parametrize(("several", "num_cut"), [("pad", 0), ("anyres", 3)])
def test_all_images_of_a_set_are_shown(make: Make, tmp_path: Path, several: str, num_cut: int) -> None:
    """With their tiles, if the images of a set have any; of a large set the first ones, and how many are not."""
    sizes = [(40, 60), (60, 40), (28, 28)]
    images = [encode_noise_image(number, size) for number, size in enumerate(sizes)]
    messages = (Message("user", "<image>" * 3 + "Which?"), Message("assistant", "one"))
    large = (Message("user", "<image>" * 10 + "Which?"), Message("assistant", "one"))
    samples = [Sample("few", messages, tuple(images)), Sample("many", large, (images[0],) * 10)]
    tiny_store(tmp_path / "stores", "sets", samples)
    views = {"views": {"single": "anyres", "several": several}}
    config = {"data": {"store_root": str(tmp_path / "stores")}, "stage": {**CONFIG["stage"], **views}}  # type: ignore[dict-item]
    asked = [_answer("sets", name, "Which?") for name in ("few", "many")]
    folder = make("a", config=config, evaluation__answers__jsonl=asked)
    (folder / "export").mkdir()
    exported = {"image_grid_pinpoints": [[28, 56], [56, 28]], "vision_config": {"image_size": 28, "patch_size": 7}}
    (folder / "export" / "config.json").write_text(json.dumps(exported))
    few, many = (each.images for each in evaluation_questions(read_runs([folder]), 6))
    assert (len(few), sum(image.canvas is not None for image in few)) == (3, num_cut)
    assert (len(many), many[-1].why) == (9, "2 more are not shown")
    page = page_of(folder)
    assert page.text.count("base view") == num_cut + (8 if num_cut else 0)
    assert len([value for name, value in page.attributes if name == "id"]) == len(
        {value for name, value in page.attributes if name == "id"}
    )


@pytest.mark.parametrize("views", [{"image_mode": "anyres"}, {"views": {"single": "anyres_max_9", "several": "pad"}}])
def test_tiles_are_drawn_over_the_images_of_questions(make: Make, tmp_path: Path, views: dict[str, Any]) -> None:
    """With an export and AnyRes: each image on the canvas of its grid, the lines between its tiles, and its base view.
    An export that is damaged is named, and the images are shown without tiles."""
    tiny_store(tmp_path / "stores", "pictures", tiny_samples(6))
    config = {"data": {"store_root": str(tmp_path / "stores")}, "stage": {**CONFIG["stage"], **views}}  # type: ignore[dict-item]
    asked = [_answer("pictures", f"{number:06d}", "What is it?") for number in range(6)]
    folder = make("a", config=config, evaluation__answers__jsonl=asked)
    (folder / "export").mkdir()
    grids = [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]]
    exported = {
        "image_grid_pinpoints": [[28 * rows, 28 * columns] for rows, columns in grids],
        "vision_config": {"image_size": 28, "patch_size": 7},
    }
    (folder / "export" / "config.json").write_text(json.dumps(exported))
    shown = [image for each in evaluation_questions(read_runs([folder]), 6) for image in each.images]
    sizes = {image.canvas.grid: image.canvas.pixels.shape[:2] for image in shown if image.canvas}
    assert len(sizes) > 1
    assert all(size == (28 * rows, 28 * columns) for (rows, columns), size in sizes.items())
    page = page_of(folder)
    cut = [image for image in shown if image.canvas]
    assert len(shown) == 7  # one sample has two
    assert len(cut) == (7 if "image_mode" in views else 5)
    assert page.html.count('<path class="cuts"') == page.text.count("base view") == len(cut)
    assert "2 × 2 tiles" in page.text
    assert page.tags.count("img") == 7 - len(cut)
    (folder / "export" / "config.json").write_text("{")
    page = page_of(folder)
    assert page.tags.count("img") == 7
    assert "config.json is damaged" in page.text


def test_rejects_are_counted_by_source(make: Make) -> None:
    """Each source has a row with what was left out while it was prepared, and by this run."""
    data = {
        "mixture": [{"source": "chats", "rejects": {"broken_image": 3}}, {"source": "pages", "rejects": {}}],
        "rejects_by_source": {"pages": {"no_supervised": 1, "too_long": 2000}},
    }
    text = page_of(make("a", data__json=data)).text
    assert text.index("broken_image 3") < text.index("pages") < text.index("no_supervised 1, too_long 2,000")


def _live(step: int, number: int, answer: str) -> dict[str, Any]:
    names = {"source": "pictures", "id": f"{number:06d}", "question": f"What is {number}?", "truth": "five"}
    return {"step": step, **names, "answer": answer}


def test_answers_during_training(make: Make, tmp_path: Path) -> None:
    """A card for each question, with its image and the answers in the order of the steps; of many steps a few, with the
    first and the last; of two runs each with its name."""
    tiny_store(tmp_path / "stores", "pictures", tiny_samples(3))
    data = {"store_root": str(tmp_path / "stores")}
    lines = [_live(step, number, f"word{step}_{number}") for step in (9, 99, 19) for number in range(3)]
    folder = make("a", config={"data": data}, answers__jsonl=[*lines, {"step": None}, "{"])
    page = page_of(folder)
    text = page.text.partition("Answers during training")[2].partition("A dotted vertical line")[0]
    assert "3 of the held-out questions" in text
    assert [text.count(f"word{step}_{number}") for step in (9, 19, 99) for number in range(3)] == [1] * 9
    assert text.index("step 9word9_1") < text.index("step 19word19_1") < text.index("step 99word99_1")
    assert len({value for name, value in page.attributes if value.startswith("data:image/jpeg;base64,")}) == 3
    assert "answers.jsonl: 1 damaged line left out" in page.text
    other = make("b", answers__jsonl=[_live(step, 0, f"other{step}_") for step in range(100)])
    text = page_of(folder, other).text
    assert "step 9, a/finetuneword9_0" in text
    assert "step 0, b/finetuneother0_" in text
    assert "step 99, b/finetuneother99_" in text
    assert text.count("other") == 8
    assert "Answers during training" not in page_of(make("c")).text


def test_hostile_texts_stay_text(make: Make) -> None:
    """Text of a run's files never becomes a tag, an attribute or a request, and nothing runs."""
    folder = make(
        "a",
        [step(0, **{f"train/loss/{EVIL}": 1.0, f"lr/{EVIL}": 1.0}), step(1, **{f"train/loss/{EVIL}": 2.0})],
        config={f"key{EVIL}": EVIL},
        data__json={
            "data_fingerprint": EVIL,
            "mixture": [{"source": EVIL, "licence": EVIL, "rejects": {EVIL: 1}}],
            "rejects_by_source": {EVIL: {EVIL: 1}},
        },
        exit__json={"code": 1, "reason": EVIL},
        starts__jsonl=[{"step": 1, "origin": EVIL, "time": EVIL, "device": EVIL, "versions": {EVIL: EVIL}}],
        non_finite__jsonl=[{"step": 1, "what": EVIL, "samples": [EVIL]}],
        evaluation__json={"by_source": {EVIL: {"metric": EVIL, "num_samples": 1}}},
        evaluation__answers__jsonl=[_answer(EVIL.replace("/", ""), EVIL, EVIL, EVIL)],
        answers__jsonl=[{"step": 1, "source": EVIL.replace("/", ""), "id": EVIL, "question": EVIL, "answer": EVIL}],
    )
    for page in (page_of(folder), page_of(folder, make("b", config={f"key{EVIL}": "other"}))):
        assert {"script", "img", "iframe", "link", "object", "foreignobject", "image", "a"} & set(page.tags) == set()
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        links = [value for name, value in page.attributes if name.endswith(("src", "href"))]
        assert [value for value in links if not value.startswith("#")] == []
        assert page.text.count("alert(1)") > 12
        assert "\u202e" not in page.html
        assert "default-src 'none'" in page.html
        assert page.tags.count("title") > 1  # numbers under the pointer


def test_ids_are_unique_and_pages_reproducible(make: Make) -> None:
    """The same files make the same page."""
    folder = make("a")
    page = page_of(folder, make("b"))
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]+)\)", page.html))
    assert used <= set(names)
    assert _Page(folder.parents[1] / "report.html").html == page_of(folder, folder.parents[1] / "b/finetune").html
