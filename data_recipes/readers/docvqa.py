"""Reader of single-page DocVQA in the forms that its publisher has shipped, unpacked or as archives.

Today these are `spdocvqa_qas.zip`, with `train_v1.0_withQT.json`, and `spdocvqa_images.tar.gz`, with the pages without
a folder. Before 2023 it was `train.tar.gz`, with `train/train_v1.0.json` and `train/documents/`.

`data` in the JSON file is a list of {questionId, question, image, docId, ucsf_document_id, ucsf_document_page_no,
answers, data_split}; `image` is `documents/NAME_PAGE.png`, also where the publisher's folder has another name. Other
keys are ignored. All questions about one page form one conversation, with the first of several accepted answers as the
target.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.packed_folders import has_folder, locate_file
from data_recipes.raw.questions import Question, make_question, merge_by_image
from data_recipes.schema.sample import Reason, Reject, Sample


def samples(root: Path, annotations: str = "train_v1.0.json") -> Iterator[Sample | Reject]:
    """Yield one sample per page, in the order of each page's first question.

    Args:
        root: the source's raw folder.
        annotations: name of the JSON file. Its variant with question types (`train_v1.0_withQT.json`) and the folders
            of the publisher's archives are tried too.

    Raises:
        DataError: the annotations file does not exist, or has no list `data`.
    """
    folders = [root, root / "spdocvqa_qas", root / annotations.split("_")[0]]
    with_types = annotations.removesuffix(".json") + "_withQT.json"
    located = (locate_file(folder / name) for name in (annotations, with_types) for folder in folders)
    path = next((path for path in located if path.is_file()), root / annotations)
    page_folders = ("documents", "spdocvqa_images", f"{folders[-1].name}/documents")
    page_folder = next((name for name in page_folders if has_folder(root / name)), "documents")
    yield from merge_by_image(_iter_questions(path, page_folder), root, lambda name: f"docvqa_{Path(name).stem}")


def _iter_questions(path: Path, page_folder: str) -> Iterator[Question | Reject]:
    for location, record in iter_records(path, list_key="data"):
        if isinstance(record, Reject):
            yield record
            continue
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers:
            # The test file has the same layout without answers.
            yield Reject(location, Reason.NO_ANSWER, "`answers` is absent or empty; is this the test file?", location)
            continue
        image = record.get("image")
        if isinstance(image, str) and image.startswith("documents/"):
            image = f"{page_folder}/{image.removeprefix('documents/')}"
        yield make_question(image, record.get("question"), answers[0], location)
