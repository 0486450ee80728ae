"""Live answers: a fixed set of held-out questions, answered greedily by the model in training, wherever it stands.

Owns which questions are asked, their prompts, and the search for answers on the packed path: no cache of keys, so each
token is a forward pass over prompts and what was said so far. Nothing here changes a weight. Every rank runs as many
passes as every other; answers depend neither on the ranks nor on the ZeRO stage.
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
from train.distributed.world import World, all_gather_objects
from train.validation.held_out import HeldOutSample, encoded, rows_of


@dataclass(frozen=True)
class Probe:
    """A sample's first question. `prompt` int32 [T] is what training renders up to its answer, with the first
    `num_images` of the sample's pictures, which are `num_tiles` tiles."""

    sample: HeldOutSample
    id: str
    question: str
    truth: str
    prompt: np.ndarray
    num_images: int
    num_tiles: int


@dataclass(frozen=True)
class Answer:
    """What the model said to a probe; `ids` end before the token at which it stopped, if it did."""

    source: str
    id: str
    question: str
    answer: str
    truth: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class LiveAnswers:
    """The probes, and this rank's rows of them as positions in `probes`; every rank has as many rows."""

    probes: Sequence[Probe]
    rows: tuple[tuple[int, ...], ...]
    processor: Processor
    stop_ids: tuple[int, ...]
    num_tokens: int

    def ask(
        self, forward: Callable[..., Any], world: World, enter: Callable[[int], None] = lambda _: None
    ) -> list[Answer]:
        """The answers of all ranks, in the order of the probes. Every rank must ask.

        Args:
            forward: `LlavaNext.forward`, or an engine around it.
            enter: told the number of a row before each pass over it.

        Raises:
            DataError: a sample cannot be read or encoded; names it.
        """
        said: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            said |= zip(row, self._greedy(row, forward, world, partial(enter, number)), strict=True)
        everywhere = {place: ids for of_rank in all_gather_objects(world, said) for place, ids in of_rank.items()}
        return [self._answer(probe, everywhere[place]) for place, probe in enumerate(self.probes)]

    @torch.no_grad()
    def _greedy(
        self, row: tuple[int, ...], forward: Callable[..., Any], world: World, enter: Callable[[], None]
    ) -> list[list[int]]:
        """The ids that follow each prompt of a row, up to where it stops.

        The row has room for whole answers from the start: what stands behind a token has no say in it, and passes of
        one shape are what compiled blocks and ZeRO-3's prefetching want.
        """
        batch = self._batch(row).to(world.device)
        first = batch.target_positions
        stops = torch.tensor(self.stop_ids, device=world.device, dtype=torch.int64)
        found = torch.empty(len(row), 0, device=world.device, dtype=torch.int64)
        for number in range(self.num_tokens):
            enter()
            next_ids = forward(replace(batch, target_positions=first + number), next_ids=True)
            batch.input_ids[0, first + number + 1] = next_ids
            found = torch.cat([found, next_ids[:, None]], dim=1)
            is_open = not bool(torch.isin(found, stops).any(dim=1).all())
            if not any(
                all_gather_objects(world, is_open)
            ):  # most answers are short, and passes dear: asking the others is neither
                break
        return [self._until_stop(ids) for ids in found.tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        return ids[: next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))]

    def _batch(self, row: tuple[int, ...]) -> Batch:
        """Prompts, each with room for an answer; the target of each is the first token of that room."""
        geometry = self.processor.config
        examples = []
        for probe in (self.probes[place] for place in row):
            example = encoded(probe.sample, self.processor)
            ids = np.concatenate([probe.prompt, np.zeros(self.num_tokens, dtype=np.int32)])
            labels = np.full_like(ids, IGNORE)
            labels[len(probe.prompt)] = 0
            images = example.layout.images[: probe.num_images]
            layout = replace(example.layout, ids=ids, labels=labels, images=images)
            examples.append(Example(layout, example.tiles[: probe.num_tiles]))
        return collate(examples, tile=geometry.tile, patches_per_tile=geometry.patches_per_side**2)

    def _answer(self, probe: Probe, ids: list[int]) -> Answer:
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(probe.sample.source, probe.id, probe.question, text, probe.truth, tuple(ids))


def live_answers(
    samples: Sequence[HeldOutSample],
    asked: EvaluateConfig,
    backbone: Backbone,
    processor: Processor,
    packing: PackingConfig,
    costs: StepCosts,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> LiveAnswers:
    """`asked.answers` questions, fewer where there are no more, dealt to the ranks.

    Which ones are asked depends on the samples alone: the sources take turns, each in its own order.

    Args:
        samples: held-out ones that have a place in the stage, in their sources' order.
        packing: the row's budgets, raised to the largest question where that exceeds them.
    """
    probes = list(islice(_probes(samples, processor), asked.answers))
    sizes = [(len(probe.prompt) + asked.answer_tokens, probe.num_tiles, 1) for probe in probes]
    rows = rows_of(sizes, packing, costs, rank=rank, num_ranks=num_ranks)
    stops = generation_config(backbone, processor.template).eos_token_id  # as the export's `generate` stops
    stop_ids = tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
    return LiveAnswers(probes, rows, processor, stop_ids, asked.answer_tokens)


def _probes(samples: Sequence[HeldOutSample], processor: Processor) -> Iterator[Probe]:
    by_source: dict[str, list[HeldOutSample]] = {}
    for sample in samples:
        by_source.setdefault(sample.source, []).append(sample)
    for turn in zip_longest(*by_source.values()):
        for sample in turn:
            probe = None if sample is None else _probe(sample, processor)
            if probe is not None:
                yield probe


def _probe(sample: HeldOutSample, processor: Processor) -> Probe | None:
    """None where the prompt is empty: a caption template, and no picture."""
    text = sample.text()
    at = next(number for number, message in enumerate(text.messages) if message.role == "assistant")
    asked = text.messages[:at]
    sizes_hw = text.sizes_hw[: sum(message.text.count(IMAGE_PLACEHOLDER) for message in asked)]
    prompt, images = processor.prompt(asked, sizes_hw)
    question = asked[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()
    num_tiles = sum(image.num_tiles for image in images)
    probe = Probe(sample, text.id, question, text.messages[at].text, prompt, len(images), num_tiles)
    return probe if len(prompt) else None
