"""Synthetic sample shapes of the published 779K mixture, for planning and benchmarks without the data.

The counts are those of the public per-folder analysis of `lmms-lab/LLaVA-NeXT-Data` and of mix665k's components. Image
sizes and text lengths are assumptions, based on what is known of the datasets (COCO's 640-pixel side, DVQA's 448 x 448
charts, scanned letter pages, book covers); none of them was measured on the released files.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SizeHW = tuple[int, int]


@dataclass(frozen=True)
class PublishedSource:
    """Distribution of the samples of one source.

    Attributes:
        name: short name of the source.
        count: number of samples in the published mixture.
        sizes_hw: image sizes as ((height, width), weight); empty for text-only sources.
        spread: standard deviation of the logarithm of each image side around the chosen size.
        mean_rounds: mean number of question-answer rounds (geometric, at least 1).
        question_tokens, answer_tokens: mean number of tokens per round (exponential).
    """

    name: str
    count: int
    sizes_hw: tuple[tuple[SizeHW, float], ...]
    spread: float
    mean_rounds: float
    question_tokens: float
    answer_tokens: float


_COCO = (
    ((480, 640), 0.44), ((427, 640), 0.24), ((640, 480), 0.16), ((640, 427), 0.06), ((375, 500), 0.05),
    ((640, 640), 0.05),
)  # fmt: skip
_GENOME = (((375, 500), 0.35), ((768, 1024), 0.2), ((600, 800), 0.15), ((500, 375), 0.15), ((683, 1024), 0.15))
_COVERS = (((500, 333), 0.7), ((500, 375), 0.2), ((500, 500), 0.1))
_WEB = (((600, 800), 0.4), ((800, 600), 0.2), ((1024, 1024), 0.25), ((400, 1000), 0.1), ((1000, 400), 0.05))

SOURCES: tuple[PublishedSource, ...] = (
    PublishedSource("llava_158k", 157_712, _COCO, 0.03, 1.8, 25, 110),
    PublishedSource("sharegpt", 40_688, (), 0.0, 3.0, 80, 330),
    PublishedSource("vqav2", 82_783, _COCO, 0.03, 5.4, 18, 3),
    PublishedSource("gqa", 72_140, _GENOME, 0.05, 13.0, 20, 3),
    PublishedSource("okvqa", 8_998, _COCO, 0.03, 1.0, 20, 3),
    PublishedSource("ocr_vqa", 80_000, _COVERS, 0.08, 5.0, 18, 8),
    PublishedSource("aokvqa", 66_160, _COCO, 0.03, 1.0, 60, 2),
    PublishedSource("refcoco", 48_447, _COCO, 0.03, 5.0, 30, 15),
    PublishedSource("vg", 86_417, _GENOME, 0.05, 8.0, 30, 20),
    PublishedSource("coco_captions", 20_000, _COCO, 0.03, 1.0, 15, 14),
    PublishedSource("sharegpt4v", 16_034, _COCO + _WEB, 0.05, 1.0, 20, 240),
    PublishedSource("laion_gpt4v", 8_048, _WEB, 0.15, 1.0, 20, 260),
    PublishedSource("docvqa", 10_194, (((2200, 1700), 0.8), ((1700, 2200), 0.2)), 0.05, 3.9, 25, 8),
    PublishedSource("synthdog_en", 40_093, (((1024, 800), 0.5), ((800, 1024), 0.5)), 0.15, 1.0, 45, 160),
    PublishedSource("chartqa", 18_317, (((600, 850), 0.7), ((557, 800), 0.2), ((850, 600), 0.1)), 0.08, 1.5, 30, 4),
    PublishedSource("dvqa", 20_000, (((448, 448), 1.0),), 0.0, 11.0, 22, 3),
    PublishedSource("ai2d", 3_247, (((450, 600), 0.6), ((600, 600), 0.4)), 0.2, 3.8, 50, 2),
)
"""The sources of stage 2. Their counts sum to 779,278, the total of the published folders."""

CAPTIONS: tuple[PublishedSource, ...] = (PublishedSource("lcs_558k", 558_128, _WEB, 0.2, 1.0, 0.01, 14),)
"""The captioned images of stage 1. BLIP captions are assumed to have about ten words."""

MAX_TEXT_TOKENS = 2048
"""Maximum length of text-only conversations, in tokens."""
SYSTEM_TOKENS = 40
"""Assumed length of the system prompt, in tokens."""


@dataclass(frozen=True)
class SampleShapes:
    """Shapes of n samples.

    Attributes:
        sources: index of the source, int16 [n].
        sizes_hw: (height, width) of the image in pixels, int64 [n, 2]; zeros for text-only samples.
        text_tokens: number of text tokens, int64 [n].
        supervised: number of supervised text tokens, int64 [n].
    """

    sources: npt.NDArray[np.int16]
    sizes_hw: npt.NDArray[np.int64]
    text_tokens: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.int64]


def draw_shapes(num_samples: int, seed: int = 0, sources: tuple[PublishedSource, ...] = SOURCES) -> SampleShapes:
    """Draw the shapes of `num_samples` samples; a deterministic function of its arguments."""
    # `order.py` seeds its permutations with the seed alone. With the same generator here, the order would be correlated
    # with the sources.
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([779_278, seed])))
    counts = np.array([source.count for source in sources], dtype=np.float64)
    drawn = random.choice(len(sources), num_samples, p=counts / counts.sum()).astype(np.int16)
    sizes = np.zeros((num_samples, 2), dtype=np.int64)
    text, supervised = np.zeros(num_samples, dtype=np.int64), np.zeros(num_samples, dtype=np.int64)
    for number, source in enumerate(sources):
        rows = np.flatnonzero(drawn == number)
        rounds = random.geometric(1 / source.mean_rounds, len(rows))
        answers = np.maximum(2, np.rint(random.gamma(rounds, source.answer_tokens))).astype(np.int64)
        questions = np.maximum(3, np.rint(random.gamma(rounds, source.question_tokens))).astype(np.int64)
        text[rows] = np.minimum(SYSTEM_TOKENS + questions + answers, MAX_TEXT_TOKENS)
        supervised[rows] = np.minimum(answers, text[rows] - SYSTEM_TOKENS)
        if source.sizes_hw:
            weights = np.array([weight for _, weight in source.sizes_hw])
            chosen = np.array([size for size, _ in source.sizes_hw])[
                random.choice(len(weights), len(rows), p=weights / weights.sum())
            ]
            scale = np.exp(random.normal(0.0, source.spread, (len(rows), 2)))
            sizes[rows] = np.maximum(1, np.rint(chosen * scale)).astype(np.int64)
    return SampleShapes(drawn, sizes, text, supervised)
