"""`python -m train.evaluate RUN`: how well an export answers questions about pictures that it never saw.

Every question is asked on its own, three ways: with its picture, with another sample's picture (what the words alone
give away), and answered with the commonest answer. An answer counts when it is exactly the truth, end token
included, in greedy decoding. Greedy decoding gives the truth just when each of its tokens is the likeliest after the
true ones before it, so one forward pass over prompt and truth decides it, without generating.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_recipes.mixture import Mixture
from data_recipes.raw.questions import ENDINGS
from data_recipes.sample import DataError, Message
from data_recipes.store import Store, StoredSample
from llava_next.batch import collate
from llava_next.config import ModelError
from llava_next.hf import read_hf
from llava_next.model import LlavaNext
from llava_next.processor import Example, Processor, SampleRejected
from train.config import ConfigError, load_yaml
from train.loader import stage_processor
from train.quiet import quiet_libraries

_PICTURES_PER_ROW = 8
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Question:
    """One question about one picture; `sample` is the number of its sample within its source."""

    source: str
    sample: int
    text: str
    truth: str


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions answered exactly; the interval is of right_picture - other_picture, at 95 %."""

    num_questions: int
    num_pictures: int
    right_picture: float
    other_picture: float
    commonest_answer: float
    commonest: str
    difference: float
    interval: tuple[float, float]


def held_out_samples(mixture: Mixture, store_root: Path) -> dict[str, list[StoredSample]]:
    """Per source, samples with one picture that training never saw: held-out ones, and those of excluded stores."""
    found: dict[str, list[StoredSample]] = {}
    for source in mixture.source_names:
        samples = [mixture.heldout_sample(source, number) for number in mixture.heldout(source)]
        found[source] = [sample for sample in samples if len(sample.pictures) == 1]
    for source in mixture.config.exclude:
        store = Store.open(store_root / source)
        found[source] = [store.sample(number) for number in range(len(store))]
    return {source: samples for source, samples in found.items() if samples}


def questions_of(source: str, samples: Sequence[StoredSample], limit: int, per_picture: int) -> list[Question]:
    """The first questions of each sample's conversation, up to `limit` in all; the samples' order decides.

    Where the conversation asks for a form of answer, with its first question, every question asks for it here: on its
    own it would not be known.
    """
    questions = []
    for number, sample in enumerate(samples):
        turns = [message for message in sample.messages if message.role != "system"]
        pairs = list(zip(turns[0::2], turns[1::2], strict=False))[:per_picture]
        ending = next((text for text in ENDINGS if pairs and pairs[0][0].text.endswith(text)), "")
        for question, answer in pairs:
            words = question.text.replace("<image>", "").strip()
            if not words.endswith(ending):
                words = f"{words}\n{ending}"
            questions.append(Question(source, number, words, answer.text))
    return questions[:limit]


def answer_all(
    model: LlavaNext, processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Hits with the right picture and with another's: bool [num_questions] each.

    The other picture is the next sample's, so every picture is used as often as a right one as as a wrong one. Both
    ways share a row and so the tower's features.
    """
    numbers = sorted({question.sample for question in questions})
    right = np.zeros(len(questions), dtype=bool)
    other = np.zeros(len(questions), dtype=bool)
    of_sample = {number: [i for i, q in enumerate(questions) if q.sample == number] for number in numbers}
    for chunk in tqdm(list(_chunks(numbers)), desc=questions[0].source, unit="row", file=sys.stderr):
        examples: list[Example] = []
        where: list[tuple[npt.NDArray[np.bool_], int]] = []
        encoded: dict[int, Example] = {}
        for place, number in enumerate(chunk):
            for picture, hits in ((number, right), (chunk[(place + 1) % len(chunk)], other)):
                for index in of_sample[number]:
                    examples.append(_ask(processor, samples[picture], questions[index], encoded, picture))
                    where.append((hits, index))
        config = processor.config
        batch = collate(examples, tile=config.tile, patches_per_tile=config.patches_per_side**2)
        scores = model.score(batch)
        missed = torch.zeros(len(examples), dtype=torch.long)
        missed.index_add_(0, batch.target_samples, (~scores.hits).long())
        for (hits, index), wrong in zip(where, missed.tolist(), strict=True):
            hits[index] = wrong == 0
    return right, other


def summarize(questions: Sequence[Question], right: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> Accuracy:
    """Accuracies, and the bootstrap interval of their difference, pictures drawn with replacement.

    The commonest answer is the commonest truth of these very questions: no constant answer can do better.
    """
    commonest, count = Counter(question.truth for question in questions).most_common(1)[0]
    keys = sorted({(question.source, question.sample) for question in questions})
    picture_of = np.array([keys.index((question.source, question.sample)) for question in questions])
    gain = np.bincount(picture_of, weights=right.astype(float) - other.astype(float), minlength=len(keys))
    size = np.bincount(picture_of, minlength=len(keys))
    draws = np.random.default_rng(0).integers(0, len(keys), size=(_NUM_RESAMPLES, len(keys)))
    differences = gain[draws].sum(axis=1) / size[draws].sum(axis=1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return Accuracy(
        num_questions=len(questions),
        num_pictures=len(keys),
        right_picture=float(right.mean()),
        other_picture=float(other.mean()),
        commonest_answer=count / len(questions),
        commonest=commonest,
        difference=float(right.mean() - other.mean()),
        interval=(float(low), float(high)),
    )


def generate_answers(
    export: Path, samples: Sequence[StoredSample], questions: Sequence[Question], processor: Processor
) -> list[dict[str, Any]]:
    """Free answers of stock transformers, from the directory alone: its model, its processor, its `generate`.

    Raises:
        RuntimeError: the stock processor renders another prompt than training did.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llava_next.anyres import decode

    stock = AutoProcessor.from_pretrained(export)
    model = AutoModelForImageTextToText.from_pretrained(export)
    answers = []
    for question in questions:
        sample = samples[question.sample]
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
        prompt = stock.apply_chat_template([turn], add_generation_prompt=True)
        inputs = stock(images=decode(sample.pictures[0]), text=prompt, return_tensors="pt")
        ours, _ = processor.prompt([Message("user", f"<image>\n{question.text}")], sample.sizes_hw)
        if inputs["input_ids"][0].tolist() != ours.tolist():
            raise RuntimeError(f"{export}: its processor renders another prompt than training did: {prompt!r}")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        text = stock.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append({**asdict(question), "answer": text.strip()})
    return answers


def _ask(
    processor: Processor, picture: StoredSample, question: Question, encoded: dict[int, Example], number: int
) -> Example:
    """The question on its own, about this picture; pixels are cut once per picture."""
    messages = (Message("user", f"<image>\n{question.text}"), Message("assistant", question.truth))
    if number not in encoded:
        encoded[number] = processor.encode(messages, picture.sizes_hw, picture.pictures)
    return Example(processor.layout(messages, picture.sizes_hw), encoded[number].tiles)


def _chunks(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Groups of pictures for one row, none of them alone: a lone picture has no other."""
    bounds = list(range(0, len(numbers), _PICTURES_PER_ROW))
    if len(bounds) > 1 and len(numbers) - bounds[-1] < 2:
        bounds.pop()
    for start, stop in zip(bounds, [*bounds[1:], len(numbers)], strict=True):
        yield list(numbers[start:stop])


def evaluate(run_dir: Path, *, limit: int, per_picture: int, num_generated: int) -> dict[str, Any]:
    """Evaluates the export of a run on everything that its mixture holds out.

    Args:
        run_dir: the stage's folder.
        limit: questions of each source.
        per_picture: questions of each picture.
        num_generated: questions of each source answered freely too.

    Raises:
        ConfigError, ModelError, DataError: no run, no export, nothing held out.
    """
    config = load_yaml(run_dir / "config.yaml")
    export = run_dir / "export"
    if not export.is_dir():
        raise ConfigError(
            f"{run_dir} holds no export/; finish the stage first: python -m train stage={config.stage.name} …"
        )
    backbone, model = read_hf(export, config.model)
    processor = stage_processor(backbone, config.stage)
    store_root = Path(config.data.store_root)
    mixture = Mixture.open(config.mixture, store_root)
    held_out = held_out_samples(mixture, store_root)
    if not held_out:
        raise ConfigError(
            f"mixture {config.mixture.name} holds nothing out; give a source `holdout: N`, or name a store in `exclude`"
        )
    by_source: dict[str, Any] = {}
    pooled: list[tuple[list[Question], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = []
    generated: list[dict[str, Any]] = []
    model.eval()
    for source, samples in held_out.items():
        questions = questions_of(source, samples, limit, per_picture)
        try:
            right, other = answer_all(model, processor, samples, questions)
        except SampleRejected as error:
            raise DataError(f"a held-out sample of {source} does not fit stage.max_length: {error}") from error
        by_source[source] = asdict(summarize(questions, right, other))
        pooled.append((questions, right, other))
        generated += generate_answers(export, samples, questions[:num_generated], processor)
    everything = summarize(
        [question for part in pooled for question in part[0]],
        np.concatenate([part[1] for part in pooled]),
        np.concatenate([part[2] for part in pooled]),
    )
    return {"run": str(run_dir), "all": asdict(everything), "by_source": by_source, "generated": generated}


def format_table(result: dict[str, Any]) -> str:
    """The accuracies as text, in percent."""
    head = f"{'source':<22}{'questions':>10}{'right':>8}{'other':>8}{'common':>8}{'difference':>12}   95 % interval"
    lines = [head]
    for source, row in [*result["by_source"].items(), ("all", result["all"])]:
        low, high = row["interval"]
        lines.append(
            f"{source:<22}{row['num_questions']:>10}{row['right_picture']:>8.1%}{row['other_picture']:>8.1%}"
            f"{row['commonest_answer']:>8.1%}{row['difference']:>+12.1%}   {low:+.1%} to {high:+.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a stage that wrote an export")
    parser.add_argument("--limit", type=int, default=600, help="questions of each source")
    parser.add_argument("--per-picture", type=int, default=4, help="questions of each picture")
    parser.add_argument("--generate", type=int, default=2, help="questions of each source answered freely too")
    parser.add_argument("--out", type=Path, help="where the result goes (default: RUN/evaluation.json)")
    options = parser.parse_args(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    try:
        result = evaluate(
            options.run, limit=options.limit, per_picture=options.per_picture, num_generated=options.generate
        )
    except (ConfigError, ModelError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out or options.run / "evaluation.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(out)
    print(format_table(result))
    for answer in result["generated"]:
        print(f"  {answer['source']}: {answer['text']!r} -> {answer['answer']!r} (truth {answer['truth']!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
