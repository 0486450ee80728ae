"""Rules that assign the records of a merged file to the datasets (components) that it was made from.

The records have no label. Their component follows from the image folder, the format instruction in a prompt, the number
of questions and the id. The first matching rule applies; a record that matches none is rejected as `unknown_component`
in every component, because it may belong to any of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from data_recipes.raw.questions import LETTER_ANSWER, ONE_SENTENCE_CAPTION, SHORT_ANSWER
from data_recipes.schema.sample import DataError


@dataclass(frozen=True)
class Rule:
    """Conditions on a record of `component`. A record matches if all conditions hold.

    Attributes:
        component: name of the component, as in a source's options.
        folders: prefixes of the image path, of which one must match; empty for records without an image.
        prompts: texts of which one must occur in a user turn, ignoring case; empty for no condition.
        id_prefix: required prefix of the id.
        min_questions: minimum number of user turns.
    """

    component: str
    folders: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    id_prefix: str = ""
    min_questions: int = 0


_COCO = ("coco/",)
_KNOWLEDGE = ("web-celebrity/", "web-landmark/", "wikiart/", "share_textvqa/")
_REGION = (
    "short description for this region",
    "short description for the given region",
    "bounding box coordinate of the region",
)
# Five datasets use COCO images. VQAv2 has 443,757 questions on 82,783 images (VQA 1.0 asked three about every image),
# OK-VQA 9,009 on 8,998, so almost always one. These are published numbers; the merged files were not counted here.
_COCO_QUESTION_SETS = (
    Rule("refcoco", _COCO, _REGION),
    Rule("aokvqa", _COCO, (LETTER_ANSWER,)),
    Rule("vqav2", _COCO, (SHORT_ANSWER,), min_questions=3),
    Rule("okvqa", _COCO, (SHORT_ANSWER,)),
)

TABLES: dict[str, tuple[Rule, ...]] = {
    # llava_v1_5_mix665k.json: the remaining records with COCO images are LLaVA-158K, without a format instruction.
    "mix665k": (
        Rule("sharegpt_text"),
        *_COCO_QUESTION_SETS,
        Rule("llava_instruct", _COCO),
        Rule("gqa", ("gqa/",)),
        Rule("ocr_vqa", ("ocr_vqa/",)),
        Rule("textcaps", ("textvqa/",)),
        Rule("vg", ("vg/",)),
    ),
    # llava_next_raw_format_processed.json, which has no text-only records. LLaVA-158K has its own format instruction,
    # so the remaining records with COCO images are ShareGPT-4V.
    "llava_next_779k": (
        Rule("coco_captions", _COCO, id_prefix="coco2014_caps_"),
        Rule("coco_captions", _COCO, (ONE_SENTENCE_CAPTION,)),
        Rule("llava_instruct", _COCO, ("Answer the question with GPT-T-COCO format.",)),
        *_COCO_QUESTION_SETS,
        Rule("sharegpt4v", ("coco/", "llava_pretrain_lcs558k/", "sharegpt4v/")),
        Rule("vg", ("vg/",)),
        Rule("ocr_vqa", ("ocr_vqa/",)),
        Rule("gqa", ("gqa/",)),
        Rule("synthdog_en", ("synthdog-en/",)),
        Rule("dvqa", ("dvqa/",)),
        Rule("chartqa", ("chartqa/",)),
        Rule("docvqa", ("docvqa/",)),
        Rule("laion_gpt4v", ("laion-gpt4v",)),
        Rule("ai2d", ("ai2d/",)),
    ),
    # open-llava-next_instruct_mix1M.json: ShareGPT-4V's version of mix665k is one component, because its captions of
    # COCO images cannot be distinguished from LLaVA-158K.
    "open_llava_next_1m": (
        Rule("sharegpt4v_mix665k"),
        Rule("sharegpt4v_mix665k", ("coco/", "gqa/", "ocr_vqa/", "textvqa/", "vg/")),
        Rule("sharegpt4v_mix665k", ("llava/", "sam/", *_KNOWLEDGE)),
        Rule("allava", ("allava_vflan/",)),
        Rule("docvqa", ("docvqa/",)),
        Rule("synthdog_en", ("synthdog-en/",)),
        Rule("chartqa", ("chartqa/", "chatqa/")),  # the published file contains the misspelling
        Rule("dvqa", ("dvqa/",)),
        Rule("ai2d", ("ai2d/",)),
        Rule("geoqa", ("geoqa+/",)),
    ),
    # sharegpt4v_instruct_gpt4-vision_cap100k.json
    "sharegpt4v_100k": (
        Rule("coco", _COCO),
        Rule("lcs", ("llava/",)),
        Rule("sam", ("sam/",)),
        Rule("knowledge", _KNOWLEDGE),
    ),
    # m4_instruct_annotations.json: 3D as lists of views (ScanNet, nuScenes, ALFRED), clips as lists of frames (NExT-QA,
    # STAR), and all other folders. A record with `video` has no image; the reader rejects it.
    "m4_instruct": (
        Rule("scannet", ("scannet_frames_25k/",)),
        Rule("nuscenes", ("nuscenes/",)),
        Rule("alfred", ("ALFRED/",)),
        Rule("frames", ("nextqa/", "star/")),
        Rule("multi_image", ("",)),
        Rule("multi_image"),
    ),
}


def find_table(table: str, selected: Collection[str]) -> tuple[Rule, ...]:
    """Return the rules of a table.

    Args:
        table: name of the table.
        selected: names of the components to read.

    Raises:
        DataError: the table or a component does not exist, or no component is selected.
    """
    if table not in TABLES:
        raise DataError(f"components: no table {table!r}; known: {', '.join(TABLES)}.")
    known = list(dict.fromkeys(rule.component for rule in TABLES[table]))
    if not selected:
        raise DataError(f"component: not given; table {table} has {', '.join(known)}.")
    for component in selected:
        if component not in known:
            raise DataError(f"component: table {table} has no {component!r}; it has {', '.join(known)}.")
    return TABLES[table]


def match_component(record: dict[str, Any], rules: Sequence[Rule]) -> str | None:
    """Return the component of a record {id, image?, conversations}, or None if no rule matches."""
    image = record.get("image")
    image = image[0] if isinstance(image, list) and image else image
    path = image if isinstance(image, str) else None
    raw_id = record.get("id")
    sample_id = str(raw_id) if isinstance(raw_id, str | int) else ""
    prompts: list[str] | None = None
    for rule in rules:
        if not _is_in_folders(path, rule.folders):
            continue
        prompts = _lowercase_prompts(record.get("conversations")) if prompts is None else prompts
        if rule.prompts and not any(text.lower() in prompt for text in rule.prompts for prompt in prompts):
            continue
        if sample_id.startswith(rule.id_prefix) and len(prompts) >= rule.min_questions:
            return rule.component
    return None


def _is_in_folders(path: str | None, folders: tuple[str, ...]) -> bool:
    if path is None or not folders:
        return path is None and not folders
    return path.startswith(folders)


def _lowercase_prompts(turns: object) -> list[str]:
    """Return the user's turns in lower case. Invalid turns are skipped; the reader rejects them."""
    valid = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in valid if turn.get("from") in ("human", "user")]
    return [text.lower() for text in texts if isinstance(text, str)]
