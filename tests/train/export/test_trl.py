"""docs/trl.md with the real TRL: its trainers tune an export, and what they save is evaluated and tuned here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Image, List, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_recipes.schema.sample import Message, Sample
from llava_next.config import ANYRES
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.batch import collate
from llava_next.model.build import build_model, read_backbone
from tests.house.pages import DOCS, ROOT, blocks
from tests.llava_next.models import pretrained
from tests.tiny import SIZES_HW, encoded_picture, tiny_store

trl = pytest.importorskip("trl", reason="TRL is not installed: ./scripts/setup.sh --extras trl")
pytestmark = pytest.mark.full
PAGE = DOCS / "trl.md"
QUESTION, CHOSEN = "What is in the picture?", "A red circle."
NUM_RECORDS = 4


class Reader:
    """A folder with an export, images, records of both kinds, and the page's programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backbone = read_backbone(pretrained(folder / "parts", template="vicuna_v1", kind="metaspace"))
        self.processor = self.backbone.processor(template=None, views=ANYRES, max_length=2048)
        self.model = build_model(self.backbone, dtype=torch.float32, seed=0)
        write_hf(self.model, self.backbone, self.processor, folder / "export")
        preferences, completions = [], []
        for number, size in enumerate(SIZES_HW[:NUM_RECORDS]):
            (folder / f"{number}.png").write_bytes(encoded_picture(number, size))
            record = {"images": [f"{number}.png"], "prompt": [{"role": "user", "content": QUESTION}]}
            preferences.append(record | {"chosen": _answer(CHOSEN), "rejected": _answer("Blue.")})
            completions.append(record | {"completion": _answer(CHOSEN)})
        for name, records in (("preferences", preferences), ("completions", completions)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (program,) = blocks("python", pages=[PAGE])
        (folder / "prefer.py").write_text(program)
        for word in ("DPOTrainer", "DPOConfig"):
            assert word in program
            program = program.replace(word, word.replace("DPO", "SFT"))
        (folder / "supervise.py").write_text(program)

    def run(self, *command: str) -> str:
        """Runs a program in the folder; it must succeed. Returns its output."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The folder in which the page's programs run."""
    return Reader(tmp_path_factory.mktemp("reader"))


def test_ids_labels_and_loss_of_a_batch(reader: Reader) -> None:
    """Of `SFTTrainer`, the ids and labels are those of training here, and the loss is that of the packed row to
    1e-5."""
    trainer = trl.SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(reader.folder / "export", dtype="float32"),
        args=trl.SFTConfig(
            output_dir=str(reader.folder / "batch"),
            per_device_train_batch_size=NUM_RECORDS,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            shuffle_dataset=False,
        ),
        train_dataset=load_dataset("json", data_files=str(reader.folder / "completions.jsonl"), split="train")
        .map(lambda row: {"images": [str(reader.folder / name) for name in row["images"]]})
        .cast_column("images", List(Image())),
        processing_class=AutoProcessor.from_pretrained(reader.folder / "export"),
    )
    theirs = next(iter(trainer.get_train_dataloader()))
    images = [(reader.folder / f"{number}.png").read_bytes() for number in range(NUM_RECORDS)]
    messages = [Message("user", f"<image>\n{QUESTION}"), Message("assistant", CHOSEN)]
    ours = [
        reader.processor.encode(messages, [size], [image])
        for size, image in zip(SIZES_HW[:NUM_RECORDS], images, strict=True)
    ]
    rows = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for ids, labels, mask in zip(theirs["input_ids"], theirs["labels"], theirs["attention_mask"], strict=True)
    ]
    expected = [(example.layout.ids.tolist(), example.layout.labels.tolist()) for example in ours]
    assert sorted(rows) == sorted(expected)
    packed = collate(ours, tile=reader.backbone.tile, patches_per_tile=reader.backbone.patches_per_side**2)
    with torch.no_grad():
        loss = trainer.model(**theirs).loss
        total = reader.model(packed)[0]
    num_supervised = sum(example.layout.num_supervised for example in ours)
    torch.testing.assert_close(loss, total / num_supervised, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("program", "records"), [("prefer.py", "preferences"), ("supervise.py", "completions")])
def test_what_a_trainer_saves_is_evaluated_and_tuned(reader: Reader, program: str, records: str) -> None:
    """The program of the page takes two steps; the answer's loss is lower in the directory that it saves, a run starts
    from that, and its export is verified."""
    out = Path(program).stem
    reader.run(program, "export", f"{records}.jsonl", out)
    samples = [
        Sample(f"s{number}", (Message("user", f"<image>\n{QUESTION}"), Message("assistant", CHOSEN)), (image,), "tiny")
        for number, image in enumerate((reader.folder / f"{number}.png").read_bytes() for number in range(NUM_RECORDS))
    ]
    stores = reader.folder / f"stores_{out}"
    store = tiny_store(stores, "tiny", samples)
    losses = {}
    for model in ("export", out):
        figures = reader.folder / f"{model}_{out}.json"
        reader.run("-m", "train.evaluate", model, "--store", str(store), "--generate", "1", "--out", str(figures))
        losses[model] = json.loads(figures.read_text())["by_source"]["tiny"]["loss"]
    assert losses[out] < losses["export"]
    configs = reader.folder / "configs" / "mixture"
    configs.mkdir(parents=True, exist_ok=True)
    (configs / "mine.yaml").write_text("name: mine\nsources: {tiny: {}}\n")
    reader.run(
        *("-m", "train", "--config-dir", "configs", "experiment=tune", f"name=after_{out}", f"stage.init_from={out}"),
        *("mixture=mine", f"data.store_root={stores}", "data.workers=0", "stage.batch_size=4", "device=cpu"),
        *("stage.max_length=512", "packing.max_tokens=512", "packing.max_tiles=8"),
    )
    assert (reader.folder / "outputs" / f"after_{out}" / "finetune" / "export" / "config.json").is_file()
