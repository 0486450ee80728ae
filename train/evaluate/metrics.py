"""How right an answer is: the metrics that the benchmarks of each kind publish, as functions of two texts.

Each takes an answer and the accepted truths and returns a score from 0 (wrong) to 1 (right); where a truth is none that
it can judge, None. `score` finds one by the name that a source's YAML gives (`data_recipes.schema.source.METRICS`).
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

Box = tuple[float, float, float, float]
Metric = Callable[[str, Sequence[str]], float | None]


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where the texts are equal but for case, outer white space and a final period.

    As LLaVA prepares its answers for GQA's program, which then compares (haotian-liu/LLaVA,
    scripts/convert_gqa_for_eval.py; https://cs.stanford.edu/people/dorarad/gqa/evaluate.html).
    """
    return float(any(_plain(answer) == _plain(truth) for truth in truths))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Normalized Levenshtein similarity to the nearest truth, 0 below the threshold; its mean over questions is ANLS.

    Case and the number of blanks do not count (Biten and others, Scene Text Visual Question Answering, 2019, equation
    1, arXiv:1907.00490; DocVQA's task page, https://rrc.cvc.uab.es/?ch=17&com=tasks).
    """
    similarities = [_similarity(_unspaced(answer).lower(), _unspaced(truth).lower()) for truth in truths]
    best = max(similarities)
    return best if best >= threshold else 0.0


def edit_similarity(answer: str, truths: Sequence[str]) -> float:
    """1 - edit distance over the longer text's length, in characters: for a page that is read aloud.

    1 minus what Donut validates SynthDoG with (clovaai/donut, lightning_module.py), the 1-N.E.D. of ICDAR's reading
    competitions; white space is collapsed first, as it is in the truths.
    """
    return max(_similarity(_unspaced(answer), _unspaced(truth)) for truth in truths)


def _unspaced(text: str) -> str:
    return " ".join(text.split())


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements of single characters.

    Wagner and Fischer's table, row by row (1974). What a row takes from its own left neighbour is a running minimum, so
    that a row is a few array operations and a page of 4,000 letters takes a second at most.
    """
    letters, columns = np.array(list(b), dtype="U1"), np.arange(len(b) + 1)
    row = columns
    for number, letter in enumerate(a, start=1):
        best = np.concatenate([[number], np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


def relaxed_accuracy(answer: str, truths: Sequence[str], tolerance: float = 0.05) -> float:
    """1 where numbers differ by at most 5 % of the truth, or other texts are equal but for case.

    ChartQA's measure (Masry and others, 2022, section 5.1, arXiv:2203.10244) as it is commonly computed: "12%" is 0.12
    (google-research/pix2struct, metrics.py). A truth of 0 has to be met letter for letter.
    """
    return float(any(_is_near(answer.strip(), truth.strip(), tolerance) for truth in truths))


def _is_near(answer: str, truth: str, tolerance: float) -> bool:
    given, wanted = _number(answer), _number(truth)
    if given is not None and wanted:
        return abs(given - wanted) <= tolerance * abs(wanted)
    return answer.lower() == truth.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def options(answer: str, truths: Sequence[str]) -> float:
    """1 where the chosen letter is the right one: a letter alone, one in front of ". ", or "The answer is X".

    The rules of LLaVA's program for ScienceQA (haotian-liu/LLaVA, llava/eval/eval_science_qa.py), for letters to Z; a
    period or parentheses around a lone letter do not count.
    """
    return float(any(_letter(answer) == _letter(truth) != "" for truth in truths))


def _letter(text: str) -> str:
    text = text.strip().replace("\n", ". ")
    found = re.fullmatch(r"\(?([A-Z])[.)]*", text) or re.match(r"([A-Z])\. ", text)
    found = found or re.search(r"The answer is ([A-Z])\b", text)
    return found.group(1) if found else ""


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """How many people gave this answer: min(1, matches / 3), averaged over leaving each person out.

    Antol and others, VQA, 2015 (https://visualqa.org/evaluation.html), with that program's normalisation of both sides.
    Of ten people, one, two, three and four who agree make 0.3, 0.6, 0.9 and 1. With a single truth, which is what
    training sets keep, a match counts whole.
    """
    given, wanted = vqa_normalized(answer), [vqa_normalized(truth) for truth in truths]
    if len(wanted) == 1:
        return float(given == wanted[0])
    matches = [truth == given for truth in wanted]
    return float(np.mean([min(1.0, (sum(matches) - own) / 3) for own in matches]))


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = dict(zip(_NUMBERS, map(str, [0, *range(11)]), strict=True))
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_mark(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _without_one_mark(word)}
_CONTRACTIONS |= {"somebody'd": "somebodyd"}  # the program's own


def vqa_normalized(text: str) -> str:
    """An answer as the VQA program compares it: punctuation, articles, number words and lost apostrophes mended.

    After GT-Vision-Lab/VQA, vqaEval.py (processPunctuation, processDigitArticle), with its oddities: a sign is taken
    out where a blank stands beside it somewhere or the text has a number such as 1,000, and becomes a blank elsewhere;
    a period goes unless a digit follows.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    has_thousands = re.search(r"\d,\d", text) is not None
    mended = text
    for sign in _PUNCTUATION:
        goes = f"{sign} " in text or f" {sign}" in text or has_thousands
        mended = mended.replace(sign, "" if goes else " ")
    mended = re.sub(r"\.(?!\d)", "", mended)
    words = [_DIGITS.get(word, word) for word in mended.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def grounding_iou(answer: str, truths: Sequence[str]) -> float | None:
    """Intersection over union of the first boxes in the texts; 0 for an answer without a box, None for truths without.

    The share of questions with at least 0.5 is RefCOCO's accuracy (Kazemzadeh and others, 2014; Mao and others, 2016).
    """
    wanted = [box for box in map(find_box, truths) if box is not None]
    given = find_box(answer)
    if not wanted:
        return None
    return max(box_iou(given, box) for box in wanted) if given is not None else 0.0


def find_box(text: str) -> Box | None:
    """The first `[x1, y1, x2, y2]` in a text."""
    number = r"\s*(-?\d*\.?\d+)\s*"
    found = re.search(rf"\[{number},{number},{number},{number}\]", text)
    return tuple(map(float, found.groups())) if found else None  # type: ignore[return-value]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); an inside-out box has no area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    together = _area(a) + _area(b) - shared
    return shared / together if together > 0 else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


BY_NAME: dict[str, Metric] = {
    function.__name__: function
    for function in (exact_match, vqa_accuracy, relaxed_accuracy, anls, options, edit_similarity, grounding_iou)
}
"""Every metric by its name."""


def score(metric: str, answer: str, truths: Sequence[str]) -> float | None:
    """What the named metric says; None for `none`, and for truths that it cannot judge."""
    return None if metric == "none" else BY_NAME[metric](answer, truths)
