"""Questions that the evaluation, or a run during training, has asked: with their images, the truth and the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.schema.sample import DataError
from train.html.page import jpeg_url
from train.observability.run_folder import Run

_SIDE = 384
MAX_STEPS = 8
"""Answers of one run to one question."""
_Key = tuple[str, str, str]
_Answers = dict[_Key, list[tuple[int, dict[str, Any]]]]
"""Answers by source, id and question, each with the number of its run."""


@dataclass(frozen=True)
class Question:
    """A question; (name, text) of it, the truth and each answer; a data URL of its image, or `why` there is none."""

    source: str
    id: str
    facts: list[tuple[str, str]]
    image_url: str | None
    why: str


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
        questions.append(Question(source, name, facts, *images.read(source, name)))
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


class _Images:
    """Images by source and id, from the stores that the runs were trained on."""

    def __init__(self, runs: Sequence[Run]) -> None:
        roots = [(run.config.get("data") or {}).get("store_root") for run in runs]
        self._roots = [Path(root) for root in dict.fromkeys(roots) if root]
        self._stores: dict[str, tuple[Any, dict[str, int]] | str] = {}

    def read(self, source: str, name: str) -> tuple[str | None, str]:
        """The sample's first image as a data URL, or why there is none."""
        if source not in self._stores:
            self._stores[source] = self._open(source)
        opened = self._stores[source]
        if isinstance(opened, str):
            return None, opened
        store, numbers = opened
        if name not in numbers:
            return None, f"no sample of the store {store.path} has this id"
        from llava_next.inputs.anyres import decode

        try:
            images = store.sample(numbers[name]).images
            return (jpeg_url(decode(images[0]), _SIDE), "") if images else (None, "the sample has no image")
        except (OSError, ValueError) as error:
            return None, f"its image cannot be read: {error}"

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
