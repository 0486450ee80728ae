"""Reader of COCO captions in their published layout: `annotations/captions_{split}.json` and the images in `{split}`.

Both may be in the archives that COCO publishes, such as `annotations_trainval2014.zip` and `train2014.zip`.

The JSON object has `images`, a list of {id, file_name, ...}, and `annotations`, a list of {id, image_id, caption} with
five captions per image. One of them, selected by hash, answers the prompt of the released LLaVA-NeXT data.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.image_files import ImageError, resolve_image
from data_recipes.raw.json_records import iter_records
from data_recipes.raw.packed_folders import locate_file
from data_recipes.raw.questions import ONE_SENTENCE_CAPTION, make_conversation, pick_by_hash
from data_recipes.schema.sample import Reason, Reject, Sample


def samples(root: Path, split: str = "train2014") -> Iterator[Sample | Reject]:
    """Yield one sample per image with a caption, in the order of `images`.

    Raises:
        DataError: the annotations file does not exist, or has no `images` or `annotations`.
    """
    path = locate_file(root / "annotations" / f"captions_{split}.json")
    captions: dict[object, list[str]] = {}
    for location, record in iter_records(path, list_key="annotations"):
        if isinstance(record, Reject):
            yield record
        elif isinstance(record.get("caption"), str) and record["caption"].strip():
            captions.setdefault(record.get("image_id"), []).append(" ".join(record["caption"].split()))
        else:
            yield Reject(location, Reason.EMPTY_ANSWER, "`caption` is empty or no string", location)
    for location, record in iter_records(path, list_key="images"):
        if isinstance(record, Reject):
            yield record
            continue
        name, number = record.get("file_name"), record.get("id")
        if not isinstance(name, str) or not isinstance(number, int):
            detail = "`file_name` must be a string and `id` a whole number"
            yield Reject(location, Reason.NOT_A_STRING, detail, location)
            continue
        if number not in captions:
            continue  # images without a caption are not part of the dataset
        sample_id = f"coco2014_caps_{number}"
        try:
            image = resolve_image(name, root / split)
        except ImageError as error:
            yield Reject(sample_id, error.reason, error.detail, location)
            continue
        caption = pick_by_hash(captions[number], sample_id)
        yield make_conversation(sample_id, [(ONE_SENTENCE_CAPTION, caption)], image, location, suffix="")
