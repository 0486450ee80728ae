"""Tests of the metrics with worked examples of the papers and programs that published them."""

import random

import pytest

from data_recipes.schema.source import METRICS
from train.evaluate import metrics

PIX2STRUCT = [
    ("abc", "abc"),
    ("abc", "Abc"),
    ("Abc", "abc"),
    ("100%", "96%"),
    ("100%", "94%"),
    ("100%", "0.96"),
    ("100%", "0.94"),
    ("Don't", "Won't"),
]
"""Predictions and targets of google-research/pix2struct, metrics_test.py, which expects the means below of them."""


def test_every_name_of_a_yaml_has_its_metric() -> None:
    """Every metric that a source may name exists."""
    assert set(metrics.METRICS_BY_NAME) == set(METRICS)


@pytest.mark.parametrize(("name", "expected"), [("anls", 47.5), ("relaxed_accuracy", 62.5)])
def test_pix2struct_examples(name: str, expected: float) -> None:
    """The means are those of pix2struct's own test."""
    scores = [metrics.METRICS_BY_NAME[name](answer, [truth]) or 0.0 for answer, truth in PIX2STRUCT]
    assert 100 * sum(scores) / len(scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truths", "expected"),
    [
        # The examples of ANLS's metric card in huggingface/evaluate (metrics/anls), each by the paper's formula.
        ("Denver Broncos", ["Denver Broncos", "Denver R. Broncos"], 1.0),
        ("12/15/89", ["12/15/88"], 1 - 1 / 8),
        ("Dear dr. Lobo", ["Dear Dr. Lobo", "Dr. Lobo"], 1.0),
        ("", ["a"], 0.0),
        ("ab", ["ac"], 0.5),  # at the threshold
        ("abc", ["a"], 0.0),  # below it
    ],
)
def test_anls(answer: str, truths: list[str], expected: float) -> None:
    """The nearest truth counts, and similarities below one half are 0."""
    assert metrics.anls(answer, truths) == pytest.approx(expected)


@pytest.mark.parametrize(("people", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(people: int, expected: float) -> None:
    """The values are those of visualqa.org's formula, averaged over the ten ways to leave one annotator out."""
    truths = ["red"] * people + [f"other {number}" for number in range(10 - people)]
    assert metrics.vqa_accuracy("Red", truths) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat.", "cat"),
        ("Two dogs, a cat", "2 dogs cat"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("none", "0"),
        ("yes\n", "yes"),
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    """The normalization is that of GT-Vision-Lab/VQA's vqaEval.py: punctuation, number words, articles and
    contractions."""
    assert metrics.normalize_vqa_answer(text) == expected


def test_a_single_truth_counts_whole() -> None:
    """With a single truth, as in training sets, a match gives 1."""
    assert metrics.vqa_accuracy("the red one", ["red 1"]) == 1.0
    assert metrics.vqa_accuracy("blue", ["red"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [("105", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("0", "0", 1), ("0.0", "0", 0), ("Yes", "yes", 1)],
)
def test_relaxed_accuracy(answer: str, truth: str, expected: int) -> None:
    """The tolerance is 5 % of the truth, inclusive; a truth of zero has no tolerance."""
    assert metrics.relaxed_accuracy(answer, [truth]) == expected


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # The cases of haotian-liu/LLaVA, llava/eval/eval_science_qa.py.
        ("B", "B"),
        ("B. A red circle", "B"),
        ("Look at the picture. The answer is B.", "B"),
        ("The answer is B", "B"),
        ("B\nbecause", "B"),
        ("Banana", ""),
        ("b", ""),
        # A lone letter with what people put around it.
        ("(B)", "B"),
        ("B.", "B"),
    ],
)
def test_options(answer: str, letter: str) -> None:
    """The chosen letter is compared; an answer without a letter is wrong."""
    assert metrics.options(answer, ["B"]) == (letter == "B")
    assert metrics.options(answer, ["C"]) == 0.0


@pytest.mark.parametrize(("a", "b", "distance"), [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3)])
def test_edit_distance_of_known_pairs(a: str, b: str, distance: int) -> None:
    """Textbook pairs, in both directions."""
    assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a) == distance


def test_edit_distance_is_the_tables() -> None:
    """The row-wise computation equals that cell by cell."""
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choice("abc ") for _ in range(rng.randrange(12))) for _ in range(2))
        row = list(range(len(b) + 1))
        for i, letter in enumerate(a, start=1):
            above, row = row, [i]
            for j, other in enumerate(b, start=1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
        assert metrics.edit_distance(a, b) == row[-1]


def test_edit_similarity() -> None:
    """One minus Donut's normalized distance: relative to the longer text, case-sensitive, with collapsed white
    space."""
    assert metrics.edit_similarity("The  quick\nfox", ["The quick fox"]) == 1.0
    assert metrics.edit_similarity("the", ["The"]) == pytest.approx(2 / 3)
    assert metrics.edit_similarity("", [""]) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[0.0, 0.0, 0.5, 1.0]", 0.5),
        ("[0.5,0,1.5,1]", 1 / 3),  # two unit squares that share a half
        ("It is at [0, 0, 1, 1].", 1.0),
        ("[1,0,2,1]", 0.0),  # they touch
        ("[1,1,0,0]", 0.0),  # inside out
        ("on the left", 0.0),
    ],
)
def test_grounding_iou(answer: str, expected: float) -> None:
    """Areas computed by hand; the first box of the answer counts."""
    assert metrics.grounding_iou(answer, ["[0.000,0.000,1.000,1.000]"]) == pytest.approx(expected)


def test_truth_without_a_box_has_no_score() -> None:
    """A truth without a box has no score."""
    assert metrics.grounding_iou("[0,0,1,1]", ["A red hat."]) is None


@pytest.mark.parametrize(("answer", "expected"), [("Blue.", 1.0), (" blue ", 1.0), ("light blue", 0.0)])
def test_exact_match(answer: str, expected: float) -> None:
    """Case, surrounding white space and a final period are ignored."""
    assert metrics.exact_match(answer, ["blue"]) == expected


def test_none_scores_nothing() -> None:
    """The metric none has no score; captions are evaluated by their loss only."""
    assert metrics.score("none", "a", ["a"]) is None
    assert metrics.score("exact_match", "a", ["a"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "truths", "expected"),
    [
        # Lin (2004), section 3.1: with beta = 1, the first candidate scores 3/4 and the second 2/4.
        ("police kill the gunman", ["police killed the gunman"], 3 / 4),
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),
        # google-research/rouge, rouge_scorer_test.py: precision 1, recall 1/3.
        ("testing", ["testing one two"], 1 / 2),
        ("A red Hat!", ["nothing", "a red hat"], 1.0),
        ("", ["a red hat"], 0.0),
        ("red", ["..."], 0.0),
        ("两 辆 车", ["两 辆 红 车"], 6 / 7),
    ],
)
def test_rouge_l(answer: str, truths: list[str], expected: float) -> None:
    """The nearest truth counts; case and punctuation do not."""
    assert metrics.rouge_l(answer, truths) == pytest.approx(expected)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    """On random words, against the textbook recurrence."""
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([draw.choice("abcd") for _ in range(draw.randint(1, 12))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, word in enumerate(a):
            for j, other in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
        expected = 2 * table[-1][-1] / (len(a) + len(b))
        assert metrics.rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(expected)
