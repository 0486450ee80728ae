"""Reader of AI2D in its published layout: `questions/NAME.png.json`, `annotations/NAME.png.json` and `images/NAME.png`.

The three folders are in the raw folder or in `ai2d/` below it, unpacked or in the published `ai2d-all.zip`.
`questions` maps the text of a question to {abcLabel, answerTexts (four), correctAnswer (an index), questionId}; `text`
in the annotations maps T0, T1, ... to {rectangle: [[left, top], [right, bottom]], replacementText, value, id}.
`ai2d_test_ids.csv` lists the test diagrams; all others are training diagrams.

A question with `abcLabel` refers to letters that replace the diagram's texts, so it is asked about a rendering with
these letters. The questions about one image form one conversation; a diagram with both kinds of questions gives two
samples. The bytes of a rendering depend on the version of Pillow.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_recipes.raw.image_files import ImageError, load_image, resolve_image
from data_recipes.raw.packed_folders import has_folder, list_files, locate_file, read_file
from data_recipes.raw.questions import LETTER_ANSWER, format_multiple_choice, make_conversation
from data_recipes.schema.sample import DataError, ImageReference, Reason, Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one or two samples per diagram of `split`, sorted by name: the original diagram, then its rendering.

    Args:
        root: the source's raw folder.
        split: train or test.

    Raises:
        DataError: a folder or the list of test diagrams is missing, or `split` is neither train nor test.
    """
    if split not in ("train", "test"):
        raise DataError(f"split: {split!r} is unknown; AI2D has train and test.")
    folder = next((folder for folder in (root, root / "ai2d") if has_folder(folder / "questions")), root)
    for name in ("questions", "annotations", "images"):
        if not has_folder(folder / name):
            raise DataError(f"{folder / name} does not exist; put ai2d-all.zip into {root}, or unpack it there.")
    located = (locate_file(each / "ai2d_test_ids.csv") for each in (root, folder))
    test_list = next((path for path in located if path.is_file()), None)
    if test_list is None:
        raise DataError(f"{root / 'ai2d_test_ids.csv'} does not exist; it is published beside ai2d-all.zip.")
    test_ids = {line.strip() for line in test_list.read_text(encoding="utf-8").splitlines()}
    for file_name in list_files(folder / "questions", ".json"):
        name = file_name.removesuffix(".json")
        if (Path(name).stem in test_ids) == (split == "test"):
            yield from _iter_diagram(folder, name)


def _iter_diagram(root: Path, name: str) -> Iterator[Sample | Reject]:
    location = f"questions/{name}.json"
    sample_id = f"ai2d_{Path(name).stem}"
    try:
        questions = _read_object(root / location)["questions"].items()
        image = resolve_image(name, root / "images")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Reject(
            sample_id, Reason.BROKEN_RECORD, f"no `questions`: {type(error).__name__}: {error}"[:200], location
        )
        return
    except ImageError as error:
        yield Reject(sample_id, error.reason, error.detail, location)
        return
    by_kind: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for text, details in questions:
        try:
            pair = format_multiple_choice(
                text, [str(option) for option in details["answerTexts"]], details["correctAnswer"]
            )
            by_kind[bool(details["abcLabel"])].append(pair)
        except (KeyError, TypeError, IndexError) as error:
            detail = f"{text[:60]!r}: {type(error).__name__}: {error}"[:200]
            yield Reject(sample_id, Reason.BROKEN_RECORD, detail, location)
    if by_kind[False]:
        yield make_conversation(sample_id, by_kind[False], image, location, LETTER_ANSWER)
    if by_kind[True]:
        yield _make_lettered_sample(
            f"{sample_id}_abc", by_kind[True], image, root / "annotations" / f"{name}.json", location
        )


def _make_lettered_sample(
    sample_id: str, pairs: list[tuple[str, str]], image: ImageReference, annotations: Path, location: str
) -> Sample | Reject:
    try:
        texts = _read_object(annotations)["text"]
        rendering = render_letters(load_image(image).data, texts)
    except ImageError as error:
        return Reject(sample_id, error.reason, error.detail, location)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        detail = f"annotations/{annotations.name}: {type(error).__name__}: {error}"[:200]
        return Reject(sample_id, Reason.BROKEN_RECORD, detail, location)
    return make_conversation(sample_id, pairs, rendering, location, LETTER_ANSWER)


def render_letters(data: bytes, texts: dict[str, Any]) -> bytes:
    """Draw each text's replacement, centred and as large as fits, on a white rectangle that covers the text.

    Args:
        data: the encoded image.
        texts: the annotations' `text` object.

    Returns:
        The rendering as PNG.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
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


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(read_file(path))
    if not isinstance(value, dict):
        raise TypeError(f"a JSON {type(value).__name__} where an object belongs")
    return value
