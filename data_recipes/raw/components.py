"""Which data set a record of a merged file comes from: mix665k, the 779K release and others are many sets in one list.

Owns: one table of rules for each merged file, and the verdict on a record.
Leaves: reading the files to `readers/llava_json.py`, the counts that each part should have to configs/source.

The files carry no label. What tells the parts apart is the folder of the picture, the ending of a prompt (recipe
4.2 to 4.4), the number of questions and the id. The first rule that fits decides; a record that fits none is left
out as `unknown_component`, in the source of every part, because it may belong to any of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from data_recipes.raw.questions import LETTER_ANSWER, ONE_SENTENCE_CAPTION, SHORT_ANSWER
from data_recipes.schema.sample import DataError


@dataclass(frozen=True)
class Rule:
    """Records that belong to `component`; every condition that is given must hold.

    Attributes:
        component: the part's name, as `component` in a source's options.
        folders: the picture's path begins with one of them; empty for records without a picture.
        prompts: some user turn contains one of them, in whatever case.
        id_prefix: the id begins so.
        min_questions: at least so many user turns.
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
# COCO pictures are asked about by five sets. VQAv2 has three questions or more on each of its 82,783 pictures, OK-VQA
# 9,009 questions on 8,998, so nearly always one (both remembered figures; checked against no real file).
_ASKED_ABOUT_COCO = (
    Rule("refcoco", _COCO, _REGION),
    Rule("aokvqa", _COCO, (LETTER_ANSWER,)),
    Rule("vqav2", _COCO, (SHORT_ANSWER,), min_questions=3),
    Rule("okvqa", _COCO, (SHORT_ANSWER,)),
)

TABLES: dict[str, tuple[Rule, ...]] = {
    # llava_v1_5_mix665k.json: what is left on COCO pictures was written by GPT-4, without an ending.
    "mix665k": (
        Rule("sharegpt_text"),
        *_ASKED_ABOUT_COCO,
        Rule("llava_instruct", _COCO),
        Rule("gqa", ("gqa/",)),
        Rule("ocr_vqa", ("ocr_vqa/",)),
        Rule("textcaps", ("textvqa/",)),
        Rule("vg", ("vg/",)),
    ),
    # llava_next_raw_format_processed.json, which leaves out the release's text-only records. LLaVA-158K got an ending
    # of its own there, so what is left on COCO pictures is ShareGPT-4V.
    "llava_next_779k": (
        Rule("coco_captions", _COCO, id_prefix="coco2014_caps_"),
        Rule("coco_captions", _COCO, (ONE_SENTENCE_CAPTION,)),
        Rule("llava_instruct", _COCO, ("Answer the question with GPT-T-COCO format.",)),
        *_ASKED_ABOUT_COCO,
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
    # open-llava-next_instruct_mix1M.json: ShareGPT-4V's version of mix665k as one part, since its captions on COCO
    # pictures look like LLaVA-158K's.
    "open_llava_next_1m": (
        Rule("sharegpt4v_mix665k"),
        Rule("sharegpt4v_mix665k", ("coco/", "gqa/", "ocr_vqa/", "textvqa/", "vg/")),
        Rule("sharegpt4v_mix665k", ("llava/", "sam/", *_KNOWLEDGE)),
        Rule("allava", ("allava_vflan/",)),
        Rule("docvqa", ("docvqa/",)),
        Rule("synthdog_en", ("synthdog-en/",)),
        Rule("chartqa", ("chartqa/", "chatqa/")),  # the published paths are misspelt
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
}


def find_table(table: str, wanted: Collection[str]) -> tuple[Rule, ...]:
    """The rules of `table`, after checking that it has the `wanted` components.

    Raises:
        DataError: there is no such table or component, or none is wanted; the known ones are listed.
    """
    if table not in TABLES:
        raise DataError(f"components: there is no table {table!r}; known: {', '.join(TABLES)}.")
    known = list(dict.fromkeys(rule.component for rule in TABLES[table]))
    if not wanted:
        raise DataError(f"component: it is missing; table {table} has {', '.join(known)}.")
    for component in wanted:
        if component not in known:
            raise DataError(f"component: table {table} has no {component!r}; it has {', '.join(known)}.")
    return TABLES[table]


def component_of(record: dict[str, Any], rules: Sequence[Rule]) -> str | None:
    """The component of a record {id, image?, conversations}, None where no rule fits."""
    image = record.get("image")
    image = image[0] if isinstance(image, list) and image else image
    path = image if isinstance(image, str) else None
    sample_id = str(record.get("id"))
    prompts: list[str] | None = None
    for rule in rules:
        if not _in_folder(path, rule.folders):
            continue
        prompts = _prompts(record.get("conversations")) if prompts is None else prompts
        if rule.prompts and not any(wanted.lower() in prompt for wanted in rule.prompts for prompt in prompts):
            continue
        if sample_id.startswith(rule.id_prefix) and len(prompts) >= rule.min_questions:
            return rule.component
    return None


def _in_folder(path: str | None, folders: tuple[str, ...]) -> bool:
    if path is None or not folders:
        return path is None and not folders
    return path.startswith(folders)


def _prompts(turns: object) -> list[str]:
    """The user's turns in small letters; what is no turn is passed over, to be rejected by the reader."""
    spoken = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in spoken if turn.get("from") in ("human", "user")]
    return [text.lower() for text in texts if isinstance(text, str)]
