"""A tiny model that has memorized the answers for three of four images, as an export."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_recipes.schema.sample import Message
from data_recipes.store.reader import StoredSample
from llava_next.config import ANYRES, ModelConfig
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import Processor
from llava_next.model.build import build_model, read_backbone
from llava_next.model.llava_next import LossSums
from tests.tiny import encoded_picture, tiny_model
from train.distributed.world import World
from train.evaluate.evaluation_ranks import EvaluationRanks

ALONE = EvaluationRanks(World(0, 0, 1, torch.device("cpu"), torch.float32, None))
SIZE_HW = (40, 40)
ANSWERS = ("red", "blue", "a cat", "no")


@dataclass(frozen=True)
class Learned:
    """The export, and its parts."""

    export: Path
    config: ModelConfig
    processor: Processor
    samples: list[StoredSample]


def sample(number: int, question: str = "What is it?", answers: Sequence[str] = ANSWERS) -> StoredSample:
    """Returns an image with one question, whose answer depends on the number."""
    messages = (Message("user", f"<image>\n{question}"), Message("assistant", answers[number]))
    picture = encoded_picture(number, SIZE_HW)
    return StoredSample(str(number), "shapes", messages, (SIZE_HW,), (picture,), (str(number),))


def learn(folder: Path, question: str = "What is it?", answers: Sequence[str] = ANSWERS) -> Learned:
    """Trains the model on the first three of four samples; takes a few seconds."""
    torch.set_num_threads(1)
    config = tiny_model(folder, tower="clip")
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    processor = backbone.processor(template=None, views=ANYRES, max_length=512)
    samples = [sample(number, question, answers) for number in range(len(answers))]
    examples = [processor.encode(s.messages, s.sizes_hw, s.images) for s in samples[:3]]
    batch = collate(examples, tile=backbone.tile, patches_per_tile=backbone.patches_per_side**2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = LossSums(*model(batch)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.3:
            break
    assert loss.item() < 0.3
    write_hf(model, backbone, processor, folder / "export")
    return Learned(folder / "export", config, processor, samples)
