"""Answers a fixed set of held-out questions greedily with the model in training.

The packed model has no key-value cache, so each new token takes a forward pass over prompts and answers. Every rank
runs the same number of passes, no weight changes, and the answers depend neither on the ranks nor on the ZeRO stage.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch

from llava_next.formats.hugging_face import generation_config
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from llava_next.inputs.processor import IGNORE, Example, Processor
from llava_next.model.build import Backbone
from llava_next.model.flops import StepCosts
from train.config.schema import EvaluateConfig, PackingConfig
from train.distributed.device_copies import to_device, to_host
from train.distributed.world import World, all_gather_objects
from train.validation.held_out import HeldOutSample, encode_sample, pack_rows


@dataclass(frozen=True)
class Probe:
    """The first question of a sample.

    Attributes:
        truth: the answer in the sample.
        prompt: ids as training renders them up to the answer, int32 [T].
        num_images: number of the sample's images in the prompt; they are the first ones.
        num_tiles: tiles of these images.
    """

    sample: HeldOutSample
    id: str
    question: str
    truth: str
    prompt: np.ndarray
    num_images: int
    num_tiles: int


@dataclass(frozen=True)
class Answer:
    """An answer of the model to a probe. `ids` end before the stop token, if the model generated one."""

    source: str
    id: str
    question: str
    answer: str
    truth: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class AnswerGenerator:
    """Generates answers to the probes.

    Attributes:
        rows: this rank's rows, as positions in `probes`; every rank has the same number of rows.
        stop_ids: ids that end an answer.
        num_tokens: maximum number of new tokens.
    """

    probes: Sequence[Probe]
    rows: tuple[tuple[int, ...], ...]
    processor: Processor
    stop_ids: tuple[int, ...]
    num_tokens: int

    def generate(
        self, forward: Callable[..., Any], world: World, enter: Callable[[int], None] = lambda _: None
    ) -> list[Answer]:
        """Returns the answers of all ranks, in the order of the probes. Every rank must call it.

        Args:
            forward: `LlavaNext.forward`, or the engine of such a model.
            enter: called with the number of a row before each pass over it.

        Raises:
            DataError: a sample cannot be read or encoded; the message names it.
        """
        rank_ids: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            rank_ids |= zip(row, self._search_greedily(row, forward, world, partial(enter, number)), strict=True)
        all_ids = {
            position: ids for gathered in all_gather_objects(world, rank_ids) for position, ids in gathered.items()
        }
        return [self._make_answer(probe, all_ids[position]) for position, probe in enumerate(self.probes)]

    @torch.no_grad()
    def _search_greedily(
        self, row: tuple[int, ...], forward: Callable[..., Any], world: World, enter: Callable[[], None]
    ) -> list[list[int]]:
        """Returns the generated ids of each prompt of a row, up to the stop token.

        The row has space for complete answers from the start: attention is causal, so later positions have no effect,
        and compiled blocks and ZeRO-3's prefetching need passes of one shape.
        """
        batch = to_device(self._make_batch(row), world.device)
        first = batch.target_positions
        stops = torch.tensor(self.stop_ids, device=world.device, dtype=torch.int64)
        ids = torch.empty(len(row), 0, device=world.device, dtype=torch.int64)
        for number in range(self.num_tokens):
            enter()
            next_ids = forward(replace(batch, target_positions=first + number), next_ids=True)
            batch.input_ids[0, first + number + 1] = next_ids
            ids = torch.cat([ids, next_ids[:, None]], dim=1)
            is_unfinished = not bool(to_host(torch.isin(ids, stops).any(dim=1).all()))
            # Most answers are short, and the collective costs much less than a pass.
            if not any(all_gather_objects(world, is_unfinished)):
                break
        return [self._cut_at_stop(answer) for answer in to_host(ids).tolist()]

    def _cut_at_stop(self, ids: list[int]) -> list[int]:
        return ids[: next((position for position, token in enumerate(ids) if token in self.stop_ids), len(ids))]

    def _make_batch(self, row: tuple[int, ...]) -> Batch:
        """Returns the prompts of a row, each followed by space for an answer, whose first token is the target."""
        geometry = self.processor.config
        examples = []
        for probe in (self.probes[position] for position in row):
            example = encode_sample(probe.sample, self.processor)
            ids = np.concatenate([probe.prompt, np.zeros(self.num_tokens, dtype=np.int32)])
            labels = np.full_like(ids, IGNORE)
            labels[len(probe.prompt)] = 0
            images = example.layout.images[: probe.num_images]
            layout = replace(example.layout, ids=ids, labels=labels, images=images)
            examples.append(Example(layout, example.tiles[: probe.num_tiles]))
        return collate(examples, tile=geometry.tile, patches_per_tile=geometry.patches_per_side**2)

    def _make_answer(self, probe: Probe, ids: list[int]) -> Answer:
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(probe.sample.source, probe.id, probe.question, text, probe.truth, tuple(ids))


def build_answer_generator(
    samples: Sequence[HeldOutSample],
    evaluate: EvaluateConfig,
    backbone: Backbone,
    processor: Processor,
    packing: PackingConfig,
    costs: StepCosts,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> AnswerGenerator:
    """Selects up to `evaluate.answers` questions and assigns them to the ranks.

    The selection depends on the samples only: the sources alternate, each in its own order.

    Args:
        samples: accepted held-out samples, in the order of their sources.
        packing: budgets of a row; raised to the largest question if that exceeds them.
    """
    probes = list(islice(_iterate_probes(samples, processor), evaluate.answers))
    sizes = [(len(probe.prompt) + evaluate.answer_tokens, probe.num_tiles, 1) for probe in probes]
    rows = pack_rows(sizes, packing, costs, rank=rank, num_ranks=num_ranks)
    stops = generation_config(
        backbone, processor.template
    ).eos_token_id  # the same ids at which the export's `generate` stops
    stop_ids = tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
    return AnswerGenerator(probes, rows, processor, stop_ids, evaluate.answer_tokens)


def _iterate_probes(samples: Sequence[HeldOutSample], processor: Processor) -> Iterator[Probe]:
    """Yields one probe of each source in turn."""
    by_source: dict[str, list[HeldOutSample]] = {}
    for sample in samples:
        by_source.setdefault(sample.source, []).append(sample)
    for turn in zip_longest(*by_source.values()):
        for sample in turn:
            probe = None if sample is None else _make_probe(sample, processor)
            if probe is not None:
                yield probe


def _make_probe(sample: HeldOutSample, processor: Processor) -> Probe | None:
    """Returns the probe of a sample; None if the prompt is empty (a caption template and no image)."""
    text = sample.text()
    at = next(number for number, message in enumerate(text.messages) if message.role == "assistant")
    messages = text.messages[:at]
    sizes_hw = text.sizes_hw[: sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages)]
    prompt, images = processor.prompt(messages, sizes_hw, num_images=len(text.sizes_hw))
    question = messages[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()
    num_tiles = sum(image.num_tiles for image in images)
    probe = Probe(sample, text.id, question, text.messages[at].text, prompt, len(images), num_tiles)
    return probe if len(prompt) else None
