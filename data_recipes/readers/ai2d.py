"""AI2D as it is published: `questions/NAME.png.json`, `annotations/NAME.png.json` and the diagrams in `images`.

`questions` maps the text of a question to {abcLabel, answerTexts (four), correctAnswer (an index), questionId};
`text` in the annotations maps T0, T1, ... to {rectangle: [[left, top], [right, bottom]], replacementText, value, id}.
`ai2d_test_ids.csv` names the test diagrams; all others are for training.

A question with `abcLabel` speaks of letters that stand in place of the diagram's texts, so it is asked about a
rendering: each text's rectangle white, its replacement written in it. Questions become one conversation a picture,
and a diagram with questions of both kinds is two pictures. A rendering is drawn here, so its bytes depend on
Pillow's version as well as on the raw files.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_recipes.raw.image_files import PictureError, inside, load
from data_recipes.raw.questions import LETTER_ANSWER, merge, multiple_choice
from data_recipes.schema.sample import DataError, Reason, Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one or two samples per diagram of `split`, diagrams by name: plain first, then lettered.

    Raises:
        DataError: a folder or the list of test diagrams is absent, or `split` is neither train nor test.
    """
    if split not in ("train", "test"):
        raise DataError(f"split: {split!r}; AI2D has train and test.")
    for name in ("questions", "annotations", "images", "ai2d_test_ids.csv"):
        if not (root / name).exists():
            raise DataError(f"{root / name}: absent; AI2D is unpacked as questions/, annotations/, images/ and more.")
    test_ids = {line.strip() for line in (root / "ai2d_test_ids.csv").read_text(encoding="utf-8").splitlines()}
    for path in sorted((root / "questions").glob("*.json")):
        name = path.name.removesuffix(".json")
        if (Path(name).stem in test_ids) == (split == "test"):
            yield from _diagram(root, name)


def _diagram(root: Path, name: str) -> Iterator[Sample | Reject]:
    place = f"questions/{name}.json"
    sample_id = f"ai2d_{Path(name).stem}"
    try:
        asked = _read(root / place)["questions"].items()
        picture = inside(root / "images", name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Reject(sample_id, Reason.BROKEN_RECORD, f"no `questions`: {type(error).__name__}: {error}"[:200], place)
        return
    except PictureError as error:
        yield Reject(sample_id, error.reason, error.detail, place)
        return
    by_kind: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for text, details in asked:
        try:
            pair = multiple_choice(text, [str(option) for option in details["answerTexts"]], details["correctAnswer"])
            by_kind[bool(details["abcLabel"])].append(pair)
        except (KeyError, TypeError, IndexError) as error:
            detail = f"{text[:60]!r}: {type(error).__name__}: {error}"[:200]
            yield Reject(sample_id, Reason.BROKEN_RECORD, detail, place)
    if by_kind[False]:
        yield merge(sample_id, by_kind[False], picture, place, LETTER_ANSWER)
    if by_kind[True]:
        yield _lettered(f"{sample_id}_abc", by_kind[True], picture, root / "annotations" / f"{name}.json", place)


def _lettered(
    sample_id: str, pairs: list[tuple[str, str]], picture: Path, annotations: Path, place: str
) -> Sample | Reject:
    try:
        texts = _read(annotations)["text"]
        rendering = letter_texts(load(picture).data, texts)
    except PictureError as error:
        return Reject(sample_id, error.reason, error.detail, place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        detail = f"annotations/{annotations.name}: {type(error).__name__}: {error}"[:200]
        return Reject(sample_id, Reason.BROKEN_RECORD, detail, place)
    return merge(sample_id, pairs, rendering, place, LETTER_ANSWER)


def letter_texts(picture: bytes, texts: dict[str, Any]) -> bytes:
    """The picture as PNG, each text's rectangle white with its replacement in the middle, as large as fits."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for text in texts.values():
        (x1, y1), (x2, y2) = text["rectangle"]
        left, right = sorted((float(x1), float(x2)))
        top, bottom = sorted((float(y1), float(y2)))
        draw.rectangle((left, top, right, bottom), fill="white")
        letters = str(text["replacementText"])
        size = max(8.0, min(0.9 * (bottom - top), 1.4 * (right - left) / max(1, len(letters))))
        middle = ((left + right) / 2, (top + bottom) / 2)
        draw.text(middle, letters, fill="black", font=ImageFont.load_default(size), anchor="mm")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise TypeError(f"a JSON {type(value).__name__} where an object belongs")
    return value
