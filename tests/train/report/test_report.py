"""What `python -m train.report` shows is what the runs' files say; nothing of them gets out of its place."""

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tiny import tiny_samples, tiny_store
from train.report.__main__ import main
from train.report.comparison import UNKNOWN, compare
from train.report.curves import MOST_POINTS, Chart, charts_of, parts_of_time, series
from train.report.run_folder import read_runs
from train.report.samples import samples_of

pytest.importorskip("matplotlib", reason="it draws the charts: ./scripts/setup.sh --extras report")

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
    """Writes the folder of a run by hand: its files by name, as values, lines of values or text."""

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
    """What a browser makes of a page: its tags, their attributes, and its text."""

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
    """The page of these runs, where the program puts it by itself."""
    assert main([str(run) for run in runs]) == 0
    place = runs[0] if len(runs) == 1 else runs[0].parents[1]
    return _Page(place / "report.html")


# ------------------------------------------------------------------------------------------------ the files


def test_damaged_lines_are_counted_and_the_others_kept(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a line cut off, one that is no object and one without a number, the first two are told; of a step that stands
    twice the last counts; a file that is no JSON is told."""
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
    """Exit code 2, with what is wrong and the way out; nothing is written."""
    folder = make("a")
    empty = make("b", ["{"])
    for arguments, said in (
        ([tmp_path / "none"], "none is not there"),
        ([tmp_path / "outputs" / "a"], "holds no config.yaml; inside it there are finetune; name"),
        ([tmp_path / "outputs"], "inside it there are a/finetune, b/finetune"),
        ([empty], r"has no finished step yet: .* \(metrics.jsonl: 1 damaged line left out\)"),
        ([folder, tmp_path / "outputs" / "b" / ".." / "a" / "finetune"], "is named twice"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert re.search(said, error), error
    assert not list(tmp_path.rglob("report.html*"))


def test_runs_are_told_apart_by_as_little_of_their_path_as_does(tmp_path: Path) -> None:
    """Name and stage, and more only where two have the same."""
    folders = [tmp_path / name for name in ("x/a/finetune", "x/b/finetune", "y/a/finetune")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("{}")
        (folder / "metrics.jsonl").write_text(_lines([step(0)]))
    assert [run.label for run in read_runs(folders[:2])] == ["a/finetune", "b/finetune"]
    assert [run.label for run in read_runs(folders)] == ["x/a/finetune", "x/b/finetune", "y/a/finetune"]


# ------------------------------------------------------------------------------------------------ what differs


def test_what_differs_is_named_and_nothing_else(make: Make) -> None:
    """Keys of the configuration, the data, versions and hardware; a run's own name is none of it."""
    start = {"step": 0, "ranks": 2, "device": "cpu", "dtype": "float32", "versions": VERSIONS}
    stage = {**CONFIG["stage"], "learning_rates": {"projector": 2.0e-3, "vision_tower": 1.0e-5}}  # type: ignore[dict-item]
    mixture = [{"source": "chats", "used": 1000}, {"source": "pictures", "used": 30}]
    data = {"data_fingerprint": "a" * 64, "mixture": mixture}
    first = make("one", starts__jsonl=[start], data__json=data)
    changed = {**start, "ranks": 4, "versions": {**VERSIONS, "torch": "2.12.0"}}
    data = {"data_fingerprint": "b" * 64, "mixture": [mixture[0], {"source": "pictures", "used": 40}]}
    second = make("two", config={"name": "two", "stage": stage}, starts__jsonl=[start, changed], data__json=data)
    third = make("three")
    found = compare(read_runs([first, second]))
    assert [(one.kind, one.name, one.values) for one in found.differences] == [
        ("configuration", "stage.learning_rates.projector", ("0.001", "0.002")),
        ("configuration", "stage.learning_rates.vision_tower", ("not there", "1e-05")),
        ("data", "data_fingerprint", ("a" * 12, "b" * 12)),
        ("data", "samples of pictures", ("30", "40")),
        ("versions", "torch", ("2.13.0", "2.12.0")),
        ("hardware", "ranks", ("2", "4")),
    ]
    unknown = {one.name: one.values for one in compare(read_runs([first, third])).differences}
    assert unknown["torch"] == ("2.13.0", UNKNOWN)  # never "equal" where nothing is known
    page = page_of(first, second)
    assert page.text.index("What differs") < page.text.index("How they went") < page.text.index("Loss")


# ------------------------------------------------------------------------------------------------ the curves


def test_a_long_run_is_thinned_without_hiding_a_step(make: Make) -> None:
    """Means of equal spans weigh every step once, and the band reaches to the lowest and the highest of all steps."""
    losses = np.random.default_rng(0).normal(5.0, 1.0, 1000)
    folder = make("long", [step(number, **{"train/loss": loss}) for number, loss in enumerate(losses.tolist())])
    (line,) = _chart(charts_of(read_runs([folder])), "Loss").lines
    assert len(line.steps) == MOST_POINTS
    assert line.low is not None
    assert line.high is not None
    assert (line.low.min(), line.high.max()) == (losses.min(), losses.max())
    assert line.values.mean() == pytest.approx(losses.mean(), abs=0.01)
    assert ((line.low <= line.values) & (line.values <= line.high)).all()


def test_what_is_no_number_is_no_point(make: Make) -> None:
    """A loss that was not finite (null in the file) leaves a gap; it is not drawn as 0."""
    folder = make("gap", [step(0), step(1, **{"train/loss": None}), step(2)])
    (run,) = read_runs([folder])
    assert series(run, "train/loss")[0].tolist() == [0.0, 2.0]


def test_neighbours_on_an_axis_have_different_numbers(make: Make) -> None:
    """Also where all values lie close together, or are very small or large."""
    for name, base, spread in (("close", 6.3, 0.01), ("small", 2e-7, 1e-7), ("large", 4e6, 3e5)):
        folder = make(name, [{"step": number, "train/loss": base + spread * number} for number in range(4)])
        drawing = page_of(folder).html.partition("<svg")[2].partition("</svg>")[0]
        told = re.findall(r"<text[^>]*text-anchor: end[^>]*>([^<]*)</text>", drawing)
        assert 4 <= len(told) == len(set(told))


def test_several_runs_lie_over_one_another(make: Make) -> None:
    """One run: all sources in one chart. Two, one of them longer: a chart of each source, a line of each run."""
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
    """What a step took is divided without rest; saves and held-out losses come on top of it."""
    lines = [step(0), step(1, **{"perf/save_s": 3.0}), step(2, **{"perf/evaluate_s": 1.0})]
    (run,) = read_runs([make("a", lines)])
    sums = {name: values.sum() for name, (_, values) in parts_of_time(run).items()}
    assert sums == {
        "forward and backward (slowest rank)": 4.5,
        "waiting for data": 0.75,
        "rest of the step": 0.75,
        "saves": 3.0,
        "held-out loss and answers": 1.0,
    }
    assert "3.0 s, 30.0%" in page_of(run.path).text


def test_resumes_are_marked_and_listed(make: Make) -> None:
    """A start at step 0 is no resume; changed versions are named at the start that had them."""
    start = {"step": 0, "time": "t0", "origin": "started afresh", "ranks": 2, "device": "cpu", "versions": VERSIONS}
    later = {**start, "step": 2, "time": "t1", "origin": "resumed", "versions": {**VERSIONS, "torch": "2.14.0"}}
    folder = make("a", starts__jsonl=[start, later])
    assert _chart(charts_of(read_runs([folder])), "Loss").marks == [(0, 2)]
    assert re.search(r"2t1resumed2cpu, torch 2\.14\.0", page_of(folder).text)
    assert "resumes are not known: b/finetune" in page_of(make("b")).text


def test_planned_memory_stands_where_the_plan_lies(make: Make) -> None:
    """Of the run's own stage, in the table and across the curve; without a plan the page says how to get it."""
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
    """And where it does not, on a CPU or an unknown card, the page says why there is none."""
    page = page_of(make("a", [step(number, **{"perf/mfu": 0.553}) for number in range(3)]))
    assert "55.3%" in page.text
    assert "share of the card's dense bf16 rate" in page.text
    page = page_of(make("b"))
    assert "No MFU of a run on a CPU" in page.text
    assert "share of the card's" not in page.text


def _chart(charts: dict[str, list[Chart]], title: str) -> Chart:
    return next(chart for each in charts.values() for chart in each if chart.title == title)


# ------------------------------------------------------------------------------------------------ the page


def _answer(source: str, name: str, text: str, answer: str = "4") -> dict[str, Any]:
    return {"source": source, "id": name, "text": text, "truth": "5", "answer": answer, "score": 0.0, "is_cut": False}


def test_questions_have_the_pictures_of_their_store(make: Make, tmp_path: Path) -> None:
    """A question of several runs stands once, with each one's answer; where the store is gone the page says so."""
    tiny_store(tmp_path / "stores", "pictures", tiny_samples(6))
    data = {"store_root": str(tmp_path / "stores")}
    asked = [_answer("pictures", f"{number:06d}", f"What is {number}?") for number in range(6)]
    first = make("one", config={"data": data}, evaluation__answers__jsonl=[*asked, _answer("gone", "1", "And this?")])
    second = make("two", config={"data": data}, evaluation__answers__jsonl=[{**asked[3], "answer": "perhaps 5"}])
    found = samples_of(read_runs([first, second]), 4)
    assert sorted(one.source for one in found) == ["gone", "pictures", "pictures", "pictures"]
    assert [one.answers for one in found if one.id == "000003"] == [[(0, "4", 0.0), (1, "perhaps 5", 0.0)]]
    assert [(one.picture, one.why[:15]) for one in found if one.source == "gone"] == [(None, "there is no sto")]
    page = page_of(first, second)
    assert len({value for name, value in page.attributes if value.startswith("data:image/jpeg;base64,")}) == 6
    assert "No picture: there is no store in" in page.text
    assert page.text.count("perhaps 5") == 1


def test_who_was_left_out_stands_by_source(make: Make) -> None:
    """Of both gates, a source a line: what preparing left out, and what has no place in this run."""
    data = {
        "mixture": [{"source": "chats", "rejects": {"broken_image": 3}}, {"source": "pages", "rejects": {}}],
        "rejects_by_source": {"pages": {"no_supervised": 1, "too_long": 2000}},
    }
    text = page_of(make("a", data__json=data)).text
    assert text.index("broken_image 3") < text.index("pages") < text.index("no_supervised 1, too_long 2,000")


def _live(step: int, number: int, answer: str) -> dict[str, Any]:
    names = {"source": "pictures", "id": f"{number:06d}", "question": f"What is {number}?", "truth": "five"}
    return {"step": step, **names, "answer": answer}


def test_answers_while_it_learned(make: Make, tmp_path: Path) -> None:
    """A card for each question, with its picture, and every step's answer in its order; of many steps a few, the first
    and the last among them; of two runs each with its name."""
    tiny_store(tmp_path / "stores", "pictures", tiny_samples(3))
    data = {"store_root": str(tmp_path / "stores")}
    lines = [_live(step, number, f"word{step}_{number}") for step in (9, 99, 19) for number in range(3)]
    folder = make("a", config={"data": data}, answers__jsonl=[*lines, {"step": None}, "{"])
    page = page_of(folder)
    text = page.text.partition("Answers while it learned")[2].partition("Evaluation")[0]
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
    assert "Answers while it learned" not in page_of(make("c")).text


def test_hostile_texts_stay_text(make: Make) -> None:
    """Whatever stands in a run's files: nothing of it becomes a tag, an attribute or a request, and nothing runs."""
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


def test_names_inside_drawings_are_unique(make: Make) -> None:
    """Drawings of one page share one space of names: a clip or a marker must be found in its own."""
    folder = make("a")
    page = page_of(folder, make("b"))
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]+)\)", page.html))
    assert used <= set(names)
    assert _Page(folder.parents[1] / "report.html").html == page_of(folder, folder.parents[1] / "b/finetune").html
