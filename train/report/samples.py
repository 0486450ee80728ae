"""Questions that the evaluation, or a run while it learned, has asked: with their pictures, the truth and the answers.

Owns which ones are shown, and fetching their pictures from the runs' stores while those can be read.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_recipes.schema.sample import DataError
from train.report.run_folder import Run

_SIDE, _JPEG_QUALITY = 384, 82
MOST_STEPS = 8
"""Answers of one run to one question."""
_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Shown:
    """One question. `answers` are (number of the run, answer, score), of a run that was learning one after each of its
    `steps`; `picture` is a JPEG, or None, and then `why`."""

    source: str
    id: str
    question: str
    truth: str
    answers: list[tuple[int, str, float | None]]
    picture: bytes | None
    why: str = ""
    steps: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        """The picture as a data URL."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.picture or b'').decode()}"


def samples_of(runs: Sequence[Run], num: int) -> list[Shown]:
    """At most `num` questions, as many of each source as there is room for, those first that most runs answered."""
    by_key: dict[_Key, list[tuple[int, dict[str, Any]]]] = {}
    for number, run in enumerate(runs):
        for answer in run.answers:
            by_key.setdefault(_key(answer, "text"), []).append((number, answer))
    pictures = _Pictures(runs)
    return [_shown(key, by_key[key], pictures) for key in _chosen(by_key, num)]


def live_of(runs: Sequence[Run], num: int) -> list[Shown]:
    """At most `num` questions that were asked while the runs learned, each with its answers in the steps' order."""
    by_key: dict[_Key, list[tuple[int, dict[str, Any]]]] = {}
    for number, run in enumerate(runs):
        asked: dict[_Key, list[dict[str, Any]]] = {}
        for answer in sorted(run.live_answers, key=lambda one: one["step"]):
            asked.setdefault(_key(answer, "question"), []).append(answer)
        for key, answers in asked.items():
            by_key.setdefault(key, []).extend((number, answer) for answer in _spread(answers))
    pictures = _Pictures(runs)
    return [
        replace(_shown(key, by_key[key], pictures), steps=tuple(answer["step"] for _, answer in by_key[key]))
        for key in _chosen(by_key, num)
    ]


def _key(answer: dict[str, Any], question: str) -> _Key:
    return str(answer.get("source")), str(answer.get("id")), str(answer.get(question))


def _spread(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many as there is room for, evenly spaced, with the first and the last."""
    num = min(len(answers), MOST_STEPS)
    return [answers[round(at * (len(answers) - 1) / max(1, num - 1))] for at in range(num)]


def _shown(key: _Key, answers: list[tuple[int, dict[str, Any]]], pictures: "_Pictures") -> Shown:
    source, name, question = key
    picture, why = pictures.read(source, name)
    told = [(number, str(answer.get("answer")), answer.get("score")) for number, answer in answers]
    return Shown(source, name, question, str(answers[0][1].get("truth")), told, picture, why)


def _chosen(by_key: dict[_Key, list[tuple[int, dict[str, Any]]]], num: int) -> list[_Key]:
    """The same for the same files: evenly spaced in each source, of different pictures where there are enough."""
    sources: dict[str, list[_Key]] = {}
    for key in sorted(by_key, key=lambda one: -len({number for number, _ in by_key[one]})):
        sources.setdefault(key[0], []).append(key)
    found: list[_Key] = []
    for position, source in enumerate(sorted(sources, key=lambda one: len(sources[one]))):
        room = (num - len(found)) // (len(sources) - position)
        first = list({key[1]: key for key in reversed(sources[source])}.values())[::-1]
        candidates = first if len(first) >= room else sources[source]
        step = max(1.0, len(candidates) / max(1, room))
        found += [candidates[int(at * step)] for at in range(min(room, len(candidates)))]
    return sorted(found, key=lambda key: list(sources).index(key[0]))


class _Pictures:
    """Pictures by source and id, from the stores that the runs were trained from."""

    def __init__(self, runs: Sequence[Run]) -> None:
        roots = [(run.config.get("data") or {}).get("store_root") for run in runs]
        self._roots = [Path(root) for root in dict.fromkeys(roots) if root]
        self._stores: dict[str, tuple[Any, dict[str, int]] | str] = {}

    def read(self, source: str, name: str) -> tuple[bytes | None, str]:
        """The sample's first picture as a JPEG, or why there is none."""
        if source not in self._stores:
            self._stores[source] = self._open(source)
        opened = self._stores[source]
        if isinstance(opened, str):
            return None, opened
        store, numbers = opened
        if name not in numbers:
            return None, f"no sample of the store {store.path} has this id"
        try:
            pictures = store.sample(numbers[name]).pictures
            return (_small(pictures[0]), "") if pictures else (None, "it has no picture")
        except (OSError, ValueError) as error:
            return None, f"its picture cannot be read: {error}"

    def _open(self, source: str) -> tuple[Any, dict[str, int]] | str:
        from data_recipes.store.reader import (
            Store,
        )  # it brings `datasets`, which a report without answers has no use for

        for root in self._roots:
            if (root / source / "manifest.json").is_file():
                try:
                    store = Store.open(root / source)
                    return store, {name: number for number, name in enumerate(store.iter_ids())}
                except (DataError, OSError, ValueError) as error:
                    return f"its store cannot be read: {error}"
        where = " or ".join(str(root / source) for root in self._roots) or "the configuration"
        return f"there is no store in {where} (data.store_root)"


def _small(encoded: bytes) -> bytes:
    from llava_next.inputs.anyres import decode

    picture = decode(encoded)
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
