"""COCO's captions as they are published: `annotations/captions_{split}.json` and the pictures in `{split}`.

One object with `images`, a list of {id, file_name, ...}, and `annotations`, a list of {id, image_id, caption}: five
captions a picture. One of them, chosen by hash, answers the prompt of the released set (recipe 4.3).
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.image_files import PictureError, inside
from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import ONE_SENTENCE_CAPTION, merge, pick_by_hash
from data_recipes.schema.sample import Reason, Reject, Sample


def samples(root: Path, split: str = "train2014") -> Iterator[Sample | Reject]:
    """Yield one sample per picture that has a caption, in the order of `images`.

    Raises:
        DataError: there is no such file, or it lacks one of its two lists.
    """
    path = root / "annotations" / f"captions_{split}.json"
    captions: dict[object, list[str]] = {}
    for place, record in iter_records(path, under="annotations"):
        if isinstance(record, Reject):
            yield record
        elif isinstance(record.get("caption"), str) and record["caption"].strip():
            captions.setdefault(record.get("image_id"), []).append(" ".join(record["caption"].split()))
        else:
            yield Reject(place, Reason.EMPTY_ANSWER, "`caption` is empty or no string", place)
    for place, record in iter_records(path, under="images"):
        if isinstance(record, Reject):
            yield record
            continue
        name, number = record.get("file_name"), record.get("id")
        if not isinstance(name, str) or not isinstance(number, int):
            detail = "`file_name` must be a string and `id` a whole number"
            yield Reject(place, Reason.NOT_A_STRING, detail, place)
            continue
        if number not in captions:
            continue  # a picture that nobody described is no record of a set of captions
        sample_id = f"coco2014_caps_{number}"
        try:
            picture = inside(root / split, name)
        except PictureError as error:
            yield Reject(sample_id, error.reason, error.detail, place)
            continue
        caption = pick_by_hash(captions[number], sample_id)
        yield merge(sample_id, [(ONE_SENTENCE_CAPTION, caption)], picture, place, suffix="")
