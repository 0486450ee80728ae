"""Hand-made records of the merged files, for each component. They are not copied from the real datasets."""

from typing import Any

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
BOX = "[0.060,0.344,0.441,0.696]"

Turns = list[tuple[str, str]]


def record(sample_id: str | int, image: str | None, turns: Turns, **more: Any) -> dict[str, Any]:
    """Build one record; the placeholder precedes the first question."""
    conversations = []
    for number, (question, answer) in enumerate(turns):
        opening = "<image>\n" if image and number == 0 else ""
        conversations += [{"from": "human", "value": opening + question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, **({"image": image} if image else {}), "conversations": conversations, **more}


def set_of_images(sample_id: str, images: list[str], question: str, answer: str, **more: Any) -> dict[str, Any]:
    """Build one record of M4-Instruct, whose id has another key; a placeholder for each image precedes the question."""
    turns = [{"from": "human", "value": "<image>" * len(images) + question}, {"from": "gpt", "value": answer}]
    return {"sample_id": sample_id, "image": images, "conversations": turns, "metadata": {"split": "train"}, **more}


def record_name(record: dict[str, Any]) -> str:
    """Return the id of a record of any merged file."""
    return str(record.get("sample_id", record.get("id")))


def coco(number: int) -> str:
    """Return the path of a COCO image in the merged files."""
    return f"coco/train2017/{number:012d}.jpg"


_COCO_QUESTION_SETS = [
    # The format instruction follows the first question only; VQAv2 has at least three questions per image.
    ("vqav2", record("000000000001", coco(1), [(f"Is it red?\n{SHORT}", "no"), ("Why?", "rain"), ("Who?", "man")])),
    ("okvqa", record("000000000002", coco(2), [(f"Which sport is this?\n{SHORT}", "tennis")])),
    ("okvqa", record("000000000003", coco(3), [(f"Which breed?\n{SHORT}", "pug"), ("From where?", "china")])),
    ("aokvqa", record("000000000004", coco(4), [(f"What is near?\nA. sea\nB. road\nC. hut\nD. sky\n{LETTER}", "B")])),
    (
        "refcoco",
        record("000000000005", coco(5), [(f"Provide a short description for this region.\n{BOX}", "left boy")]),
    ),
    (
        "refcoco",
        record(
            "000000000006",
            coco(6),
            [
                (f"Please provide the bounding box coordinate of the region this sentence describes: {n} boy", BOX)
                for n in "abc"
            ],
        ),
    ),
]
_OTHER_QUESTION_SETS = [
    ("gqa", record(2300001, "gqa/images/2300001.jpg", [(f"Is the sky dark?\n{SHORT}", "No"), ("Who runs?", "boy")])),
    ("ocr_vqa", record("0001112223", "ocr_vqa/images/0001112223.jpg", [(f"Who wrote it?\n{SHORT}", "A. Writer")])),
    (
        "vg",
        record(
            "VG_100K/7",
            "vg/VG_100K/7.jpg",
            [(f"Provide a short description for the given region.\n{BOX}", "a cup"), (BOX, "a red cup")],
        ),
    ),
    (
        "vg",
        record("VG_100K_2/8", "vg/VG_100K_2/8.jpg", [(f"Provide a short description for this region.\n{BOX}", "hat")]),
    ),
]
_CHAT = record("aB3xY_0", None, [("Write a haiku.", "Snow on the harbour."), ("Another.", "Rain.")], model="")
_DESCRIBED = record("000000000010", coco(10), [("What is the man doing?", "He is mending a net on the quay.")])
_ONE_SENTENCE = "Provide a one-sentence caption for the provided image."

_SCAN = "scannet_frames_25k/scene0000_00/color"
_CAMERAS = [f"CAM_{each}" for each in ("FRONT_LEFT", "FRONT", "FRONT_RIGHT", "BACK_RIGHT", "BACK", "BACK_LEFT")]

# {table: [(component, record)]}
MERGED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "mix665k": [
        *_COCO_QUESTION_SETS,
        *_OTHER_QUESTION_SETS,
        ("llava_instruct", _DESCRIBED),
        ("sharegpt_text", _CHAT),
        ("textcaps", record("t1", "textvqa/train_images/t1.jpg", [(_ONE_SENTENCE, "A sign.")])),
    ],
    "llava_next_779k": [
        *_COCO_QUESTION_SETS,
        *_OTHER_QUESTION_SETS,
        (
            "llava_instruct",
            record(
                "000000000010",
                coco(10),
                [
                    ("What is he doing?\nAnswer the question with GPT-T-COCO format.", "Mending a net."),
                    ("Where?", "Here."),
                ],
            ),
        ),
        ("coco_captions", record("coco2014_caps_11", coco(11), [(_ONE_SENTENCE, "A boat in fog.")])),
        ("sharegpt4v", record("000000000012", coco(12), [("Describe this image in detail.", "In the centre a boat.")])),
        (
            "sharegpt4v",
            record("004539", "llava_pretrain_lcs558k/images/00453/004539.jpg", [("Describe it.", "A vase.")]),
        ),
        ("sharegpt4v", record("w1", "sharegpt4v/wikiart/w1.jpg", [("Describe it.", "An oil painting.")])),
        ("synthdog_en", record("synthdog_en_00074_000001", "synthdog-en/images/1.jpg", [("OCR this image.", "early")])),
        (
            "dvqa",
            record("bar_train_00000009.png", "dvqa/images/bar_train_00000009.png", [(f"How many?\n{SHORT}", "four")]),
        ),
        (
            "chartqa",
            record("chart_qa_two_col_1", "chartqa/train/png/two_col_1.png", [(f"Which year?\n{SHORT}", "2016")]),
        ),
        ("docvqa", record("docvqa_1", "docvqa/images/abcd0001_3.png", [(f"What is the date?\n{SHORT}", "May 4")])),
        ("laion_gpt4v", record("laion_1", "laion-gpt4v-20231128/00000/1.jpg", [("What is it?", "A meadow at dawn.")])),
        ("ai2d", record("17.png", "ai2d/abc_images/17.png", [(f"What feeds on B?\nA. A\nB. C\n{LETTER}", "A")])),
    ],
    "open_llava_next_1m": [
        *[("sharegpt4v_mix665k", each) for _, each in (*_COCO_QUESTION_SETS, *_OTHER_QUESTION_SETS)],
        ("sharegpt4v_mix665k", _CHAT),
        ("sharegpt4v_mix665k", record("t1", "textvqa/train_images/t1.jpg", [(_ONE_SENTENCE, "A sign.")])),
        (
            "sharegpt4v_mix665k",
            record("004539", "llava/llava_pretrain/images/00453/004539.jpg", [("Describe.", "A vase.")]),
        ),
        ("sharegpt4v_mix665k", record("sa_1", "sam/images/sa_1.jpg", [("Describe.", "A square.")])),
        ("sharegpt4v_mix665k", record("p1", "wikiart/images/p1.jpg", [("Describe.", "An oil painting.")])),
        ("allava", record("al1", "allava_vflan/images/images_191task_1k/al1.png", [("Is it so?", "It is, because.")])),
        ("docvqa", record("d1", "docvqa/train/documents/abcd0001_3.png", [(f"What is the date?\n{SHORT}", "May 4")])),
        ("synthdog_en", record("s1", "synthdog-en/images/1.jpg", [("OCR this image.", "early")])),
        ("chartqa", record("c1", "chatqa/train/png/two_col_1.png", [(f"Which year?\n{SHORT}", "2016")])),
        ("dvqa", record("b1", "dvqa/images/bar_train_00000009.png", [(f"How many?\n{SHORT}", "four")])),
        ("ai2d", record("a1", "ai2d/images/17.png", [(f"What feeds on B?\nA. x\nB. y\n{LETTER}", "A")])),
        ("geoqa", record("g1", "geoqa+/images/1.png", [("How large is the angle?\nA. 30\nB. 60", "B")])),
    ],
    "sharegpt4v_100k": [
        ("coco", record("000000000042", coco(42), [("Describe this image in detail.", "In the centre a boat.")])),
        ("lcs", record("004539", "llava/llava_pretrain/images/00453/004539.jpg", [("Describe it.", "A vase.")])),
        ("sam", record("sa_1", "sam/images/sa_1.jpg", [("Describe it.", "A square at noon.")])),
        ("knowledge", record("l1", "web-landmark/images/l1.jpg", [("Describe it.", "A tower.")])),
        ("knowledge", record("p1", "wikiart/images/p1.jpg", [("Describe it.", "An oil painting.")])),
    ],
    "m4_instruct": [
        (
            "scannet",
            set_of_images("s1", [f"{_SCAN}/{n:06d}.jpg" for n in (0, 100, 200)], "Where is it?", "At the wall."),
        ),
        ("nuscenes", set_of_images("n1", [f"nuscenes/{camera}/1.jpg" for camera in _CAMERAS], "Who waits?", "A car.")),
        ("alfred", set_of_images("a1", ["ALFRED/images/1.jpg", "ALFRED/images/2.jpg"], "Next?", "Open the door.")),
        ("frames", set_of_images("q1", [f"nextqa/7/{n}.jpg" for n in range(4)], "Why?", "It rains.")),
        ("frames", set_of_images("t1", [f"star/8/{n}.jpg" for n in range(4)], "What follows?", "He sits.")),
        ("multi_image", set_of_images("d1", ["Spot-the-Diff/1.jpg", "Spot-the-Diff/2.jpg"], "What differs?", "A cup.")),
        ("multi_image", set_of_images("v1", ["VISION/1.jpg"], "Which?", "The left one.")),
    ],
}
