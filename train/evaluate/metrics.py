"""Metrics of free answers, as published benchmarks define them.

A metric takes an answer and the accepted truths and returns a score from 0 (wrong) to 1 (right), or None if it cannot
score the truths. The names are those of `data_recipes.schema.source.METRICS`, which a source's YAML selects from.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

Box = tuple[float, float, float, float]
Metric = Callable[[str, Sequence[str]], float | None]


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """Returns 1 if the texts are equal up to case, surrounding white space and a final period.

    This is how LLaVA prepares answers for GQA's evaluation program, which compares them (haotian-liu/LLaVA,
    scripts/convert_gqa_for_eval.py; https://cs.stanford.edu/people/dorarad/gqa/evaluate.html).
    """
    return float(any(_normalize(answer) == _normalize(truth) for truth in truths))


def _normalize(text: str) -> str:
    return text.strip().rstrip(".").lower()


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Returns the normalized Levenshtein similarity to the nearest truth, 0 below the threshold.

    The mean over questions is ANLS. Case and the number of spaces are ignored (Biten and others, Scene Text Visual
    Question Answering, 2019, equation 1, arXiv:1907.00490; DocVQA's task page, https://rrc.cvc.uab.es/?ch=17&com=tasks).
    """
    similarities = [
        _compute_similarity(_collapse_spaces(answer).lower(), _collapse_spaces(truth).lower()) for truth in truths
    ]
    best = max(similarities)
    return best if best >= threshold else 0.0


def edit_similarity(answer: str, truths: Sequence[str]) -> float:
    """Returns 1 - edit distance / length of the longer text, in characters; for transcriptions of pages.

    This is 1 minus the metric with which Donut validates SynthDoG (clovaai/donut, lightning_module.py), and the
    1-N.E.D. of ICDAR's competitions. White space is collapsed first, as in the truths.
    """
    return max(_compute_similarity(_collapse_spaces(answer), _collapse_spaces(truth)) for truth in truths)


def _collapse_spaces(text: str) -> str:
    return " ".join(text.split())


def _compute_similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """Returns the Levenshtein distance: the number of inserted, deleted and replaced characters.

    Computes the table of Wagner and Fischer (1974) row by row. The dependence on the left neighbour is a running
    minimum, so a row takes a few array operations, and a page of 4,000 characters at most a second.
    """
    letters, columns = np.array(list(b), dtype="U1"), np.arange(len(b) + 1)
    row = columns
    for number, letter in enumerate(a, start=1):
        best = np.concatenate([[number], np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


def relaxed_accuracy(answer: str, truths: Sequence[str], tolerance: float = 0.05) -> float:
    """Returns 1 if numbers differ by at most 5 % of the truth, or if other texts are equal up to case.

    ChartQA's metric (Masry and others, 2022, section 5.1, arXiv:2203.10244) as it is commonly computed: "12%" is 0.12
    (google-research/pix2struct, metrics.py). A truth of 0 is compared as text.
    """
    return float(any(_is_near(answer.strip(), truth.strip(), tolerance) for truth in truths))


def _is_near(answer: str, truth: str, tolerance: float) -> bool:
    number, true_number = _parse_number(answer), _parse_number(truth)
    if number is not None and true_number:
        return abs(number - true_number) <= tolerance * abs(true_number)
    return answer.lower() == truth.lower()


def _parse_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def options(answer: str, truths: Sequence[str]) -> float:
    """Returns 1 if the chosen letter is right: a single letter, one before ". ", or "The answer is X".

    These are the rules of LLaVA's program for ScienceQA (haotian-liu/LLaVA, llava/eval/eval_science_qa.py), extended to
    the letters up to Z; a period or parentheses around a single letter are ignored.
    """
    return float(any(_find_letter(answer) == _find_letter(truth) != "" for truth in truths))


def _find_letter(text: str) -> str:
    text = text.strip().replace("\n", ". ")
    match = re.fullmatch(r"\(?([A-Z])[.)]*", text) or re.match(r"([A-Z])\. ", text)
    match = match or re.search(r"The answer is ([A-Z])\b", text)
    return match.group(1) if match else ""


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Returns min(1, matches / 3), averaged over all subsets that leave out one annotator.

    Antol and others, VQA, 2015 (https://visualqa.org/evaluation.html), with the normalization of that program on both
    sides. Of ten annotators, one, two, three and four matches give 0.3, 0.6, 0.9 and 1. With a single truth, as in
    training sets, a match gives 1.
    """
    normalized, normalized_truths = normalize_vqa_answer(answer), [normalize_vqa_answer(truth) for truth in truths]
    if len(normalized_truths) == 1:
        return float(normalized == normalized_truths[0])
    matches = [truth == normalized for truth in normalized_truths]
    return float(np.mean([min(1.0, (sum(matches) - match) / 3) for match in matches]))


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = dict(zip(_NUMBERS, map(str, [0, *range(11)]), strict=True))
_APOSTROPHE_WORDS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _remove_each_apostrophe(word: str) -> list[str]:
    """Returns the spellings of a word with one of its apostrophes removed."""
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {short: word for word in _APOSTROPHE_WORDS.split() for short in _remove_each_apostrophe(word)}
_CONTRACTIONS |= {"somebody'd": "somebodyd"}  # as in the VQA program


def normalize_vqa_answer(text: str) -> str:
    """Normalizes an answer as the VQA program does: punctuation, articles, number words and missing apostrophes.

    Follows GT-Vision-Lab/VQA, vqaEval.py (processPunctuation, processDigitArticle). A punctuation mark is removed if it
    is next to a space anywhere in the text or the text has a number such as 1,000; otherwise it becomes a space. A
    period is removed unless a digit follows.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    has_thousands = re.search(r"\d,\d", text) is not None
    normalized = text
    for mark in _PUNCTUATION:
        is_removed = f"{mark} " in text or f" {mark}" in text or has_thousands
        normalized = normalized.replace(mark, "" if is_removed else " ")
    normalized = re.sub(r"\.(?!\d)", "", normalized)
    words = [_DIGITS.get(word, word) for word in normalized.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def grounding_iou(answer: str, truths: Sequence[str]) -> float | None:
    """Returns the IoU of the first boxes in the texts; 0 for an answer without a box, None for truths without one.

    The share of questions with an IoU of at least 0.5 is RefCOCO's accuracy (Kazemzadeh and others, 2014; Mao and
    others, 2016).
    """
    true_boxes = [box for box in map(find_box, truths) if box is not None]
    answer_box = find_box(answer)
    if not true_boxes:
        return None
    return max(box_iou(answer_box, box) for box in true_boxes) if answer_box is not None else 0.0


def find_box(text: str) -> Box | None:
    """Returns the first `[x1, y1, x2, y2]` in a text; None if there is none."""
    number = r"\s*(-?\d*\.?\d+)\s*"
    match = re.search(rf"\[{number},{number},{number},{number}\]", text)
    return tuple(map(float, match.groups())) if match else None  # type: ignore[return-value]


def box_iou(a: Box, b: Box) -> float:
    """Returns the IoU of two boxes (x1, y1, x2, y2). A box with x2 < x1 or y2 < y1 has no area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = _compute_area(a) + _compute_area(b) - intersection
    return intersection / union if union > 0 else 0.0


def _compute_area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def rouge_l(answer: str, truths: Sequence[str]) -> float:
    """Returns the F1 score of the longest common subsequence of words with the nearest truth.

    ROUGE-L (Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, section 3, with beta = 1) over words of
    letters and digits in lower case, as google-research/rouge computes it without stemming. LLaVA-NeXT-Interleave's
    evaluation reports it for open answers, of which it takes the first 512 characters.
    """
    words = _split_words(answer)
    return max(_compute_lcs_f1(words, _split_words(truth)) for truth in truths)


def _split_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _compute_lcs_f1(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence; computed row by row, where the left neighbour is a running maximum."""
    row, others = np.zeros(len(b) + 1, dtype=np.int64), np.array(b, dtype=object)
    for word in a:
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + (others == word)))
    return 2 * int(row[-1]) / (len(a) + len(b)) if a and b else 0.0


METRICS_BY_NAME: dict[str, Metric] = {
    function.__name__: function
    for function in (
        exact_match,
        vqa_accuracy,
        relaxed_accuracy,
        anls,
        options,
        edit_similarity,
        grounding_iou,
        rouge_l,
    )
}
"""All metrics by name."""


def score(metric: str, answer: str, truths: Sequence[str]) -> float | None:
    """Returns the score of the named metric; None for the metric `none` and for truths that it cannot score."""
    return None if metric == "none" else METRICS_BY_NAME[metric](answer, truths)
