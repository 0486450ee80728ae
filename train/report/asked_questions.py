"""Questions that the evaluation, or a run during training, has asked: with their images, the truth and the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

from data_recipes.schema.sample import DataError
from llava_next.config import Grid, ModelError
from llava_next.inputs.anyres import cut_tiles, decode, grids_from_pinpoints, image_layout
from train.config.removed_keys import with_views
from train.html.page import is_number, jpeg_url
from train.html.views import Canvas, canvas_of
from train.observability.run_folder import Run

_SIDE, _CANVAS_SIDE = 384, 768
MAX_STEPS = 8
"""Answers of one run to one question."""
_MAX_IMAGES = 8
"""Shown images of a set."""
_Key = tuple[str, str, str]
_Answers = dict[_Key, list[tuple[int, dict[str, Any]]]]
"""Answers by source, id and question, each with the number of its run."""


@dataclass(frozen=True)
class Image:
    """An image of a question as the model sees it.

    Attributes:
        url: data URL of the image; None if it cannot be shown.
        why: the reason why it cannot.
        canvas: where AnyRes cuts the image; `url` then shows the canvas. None where the tiles are not known.
        base_view_url: data URL of the base view; only with `canvas`.
    """

    url: str | None = None
    why: str = ""
    canvas: Canvas | None = None
    base_view_url: str | None = None


@dataclass(frozen=True)
class Question:
    """A question: its images, and (name, text) of the question, the truth and each answer."""

    source: str
    id: str
    facts: list[tuple[str, str]]
    images: tuple[Image, ...]


def evaluation_questions(runs: Sequence[Run], num: int) -> list[Question]:
    """At most `num` questions, of each source as many as fit, those first that most runs answered."""
    by_key: _Answers = {}
    for number, run in enumerate(runs):
        for answer in run.answers:
            by_key.setdefault(_key(answer, "text"), []).append((number, answer))
    return _questions(runs, by_key, num)


def live_questions(runs: Sequence[Run], num: int) -> list[Question]:
    """At most `num` questions that were asked during training, each with its answers in the order of the steps."""
    by_key: _Answers = {}
    for number, run in enumerate(runs):
        asked: dict[_Key, list[dict[str, Any]]] = {}
        for answer in sorted(run.live_answers, key=lambda line: line["step"]):
            asked.setdefault(_key(answer, "question"), []).append(answer)
        for key, answers in asked.items():
            count = min(len(answers), MAX_STEPS)
            spaced = [answers[round(n * (len(answers) - 1) / max(1, count - 1))] for n in range(count)]
            by_key.setdefault(key, []).extend((number, answer) for answer in spaced)
    return _questions(runs, by_key, num)


def _key(answer: dict[str, Any], question: str) -> _Key:
    return str(answer.get("source")), str(answer.get("id")), str(answer.get(question))


def _questions(runs: Sequence[Run], by_key: _Answers, num: int) -> list[Question]:
    images, questions = _Images(runs), []
    for source, name, question in _choose(by_key, num):
        answers = by_key[source, name, question]
        facts = [("question", question), ("truth", str(answers[0][1].get("truth")))]
        for number, answer in answers:
            labels = [f"step {answer['step']}"] if "step" in answer else []
            labels += [runs[number].label] if len(runs) > 1 else []
            score = answer.get("score")
            text = str(answer.get("answer")) + ("" if score is None else f"  (score {score:.2f})")
            facts.append((", ".join(labels) or "answer", text))
        questions.append(Question(source, name, facts, images.read(source, name)))
    return questions


def _choose(by_key: _Answers, num: int) -> list[_Key]:
    """The same for the same files: evenly spaced in each source, of different images where there are enough."""
    sources: dict[str, list[_Key]] = {}
    for key in sorted(by_key, key=lambda each: -len({number for number, _ in by_key[each]})):
        sources.setdefault(key[0], []).append(key)
    chosen: list[_Key] = []
    for position, source in enumerate(sorted(sources, key=lambda each: len(sources[each]))):
        room = (num - len(chosen)) // (len(sources) - position)
        first = list({key[1]: key for key in reversed(sources[source])}.values())[::-1]
        candidates = first if len(first) >= room else sources[source]
        step = max(1.0, len(candidates) / max(1, room))
        chosen += [candidates[int(n * step)] for n in range(min(room, len(candidates)))]
    return sorted(chosen, key=lambda key: list(sources).index(key[0]))


class _Tiling(NamedTuple):
    """What decides the tiles of an image: the grids, pixels and patches along a side of a tile, and whether the images
    of a set are cut too."""

    grids: tuple[Grid, ...]
    tile: int
    patches_per_side: int
    cuts_sets: bool


def _read_tiling(runs: Sequence[Run]) -> _Tiling | None:
    """That of the first run with an export and AnyRes tiles; None if there is none."""
    for run in runs:
        vision: Any = run.exported.get("vision_config")
        pinpoints = run.exported.get("image_grid_pinpoints")
        views = with_views(run.stage).get("views")
        if not isinstance(views, dict) or not str(views.get("single")).startswith("anyres"):
            continue
        if not isinstance(vision, dict) or not pinpoints:
            continue
        tile: Any = vision.get("image_size")
        patch: Any = vision.get("patch_size")
        if is_number(tile) and is_number(patch) and tile >= patch > 0:
            try:
                grids, cuts_sets = grids_from_pinpoints(pinpoints, int(tile)), str(views.get("several"))
                return _Tiling(grids, int(tile), int(tile // patch), cuts_sets.startswith("anyres"))
            except (ModelError, TypeError):
                continue  # not the config of a LLaVA-NeXT; images are shown without tiles
    return None


class _Images:
    """Images by source and id, from the stores that the runs were trained on."""

    def __init__(self, runs: Sequence[Run]) -> None:
        roots = [(run.config.get("data") or {}).get("store_root") for run in runs]
        self._roots = [Path(root) for root in dict.fromkeys(roots) if root]
        self._tiling = _read_tiling(runs)
        self._stores: dict[str, tuple[Any, dict[str, int]] | str] = {}

    def read(self, source: str, name: str) -> tuple[Image, ...]:
        """The sample's images, or why there is none."""
        if source not in self._stores:
            self._stores[source] = self._open(source)
        opened = self._stores[source]
        if isinstance(opened, str):
            return (Image(why=opened),)
        store, numbers = opened
        if name not in numbers:
            return (Image(why=f"no sample of the store {store.path} has this id"),)
        try:
            sample = store.sample(numbers[name])
            shown = [self._show(encoded, len(sample.images)) for encoded in sample.images[:_MAX_IMAGES]]
        except (OSError, ValueError) as error:
            return (Image(why=f"its image cannot be read: {error}"),)
        num_hidden = len(sample.images) - len(shown)
        if num_hidden > 0:
            shown.append(Image(why=f"{num_hidden} more are not shown"))
        return tuple(shown) or (Image(why="the sample has no image"),)

    def _show(self, encoded: bytes, num_images: int) -> Image:
        image = decode(encoded)
        if self._tiling is None or (num_images > 1 and not self._tiling.cuts_sets):
            return Image(jpeg_url(image, _SIDE))
        grids, tile, patches, _ = self._tiling
        size_hw = (image.height, image.width)
        layout = image_layout(size_hw, mode="anyres", grids=grids, tile=tile, patches_per_side=patches)
        tiles = cut_tiles(image, layout, tile)
        canvas = canvas_of(layout, tiles, encoded)
        urls = [jpeg_url(PIL.Image.fromarray(pixels), _CANVAS_SIDE) for pixels in (canvas.pixels, tiles[0])]
        return Image(urls[0], canvas=canvas, base_view_url=urls[1])

    def _open(self, source: str) -> tuple[Any, dict[str, int]] | str:
        from data_recipes.store.reader import Store  # imports `datasets`, which a report without answers does not need

        for root in self._roots:
            if (root / source / "manifest.json").is_file():
                try:
                    store = Store.open(root / source)
                    return store, {name: number for number, name in enumerate(store.iter_ids())}
                except (DataError, OSError, ValueError) as error:
                    return f"its store cannot be read: {error}"
        where = " or ".join(str(root / source) for root in self._roots) or "the configuration"
        return f"there is no store in {where} (data.store_root)"
