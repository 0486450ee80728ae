"""`python -m train.chat EXPORT [IMAGE ...]`: a conversation about images in the terminal, with streamed answers.

Stock transformers runs the export with its own model, processor and chat template. Every line is a question; empty
lines are ignored.
"""

import argparse
import io
import math
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from data_recipes.schema.arguments import ArgumentParser, path_argument
from data_recipes.schema.console import run_program
from llava_next.config import ModelError
from llava_next.formats.onevision import load_processor
from llava_next.inputs.anyres import decode
from llava_next.inputs.chat_template import should_add_special_tokens
from llava_next.model.towers import stock_unsupported_reason
from llava_next.model_directory import model_argument
from train.config.exit_codes import report_mistake
from train.distributed.quiet_libraries import quiet_libraries

_HELP = (
    "/image FILE: new conversation about another image   /images FILE FILE ...: about several   /new: new conversation"
    "   /quit or Ctrl-D: exit"
)


class _StopOnEvent(StoppingCriteria):  # type: ignore[misc]
    """Stops the generation of an answer when `event` is set."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass
class Conversation:
    """The images, which belong to the first question, and the turns so far in the format of chat templates."""

    images: Sequence[Image.Image] = ()
    turns: list[dict[str, Any]] = field(default_factory=list)


class Chat:
    """Answers questions with an export in stock transformers.

    Args:
        export: the directory of the export, or a run folder that contains export/.
        device: device of the model; on a CPU the weights are converted to float32.
        max_new_tokens: maximum length of an answer, in tokens.
        temperature: 0 selects greedy decoding.

    Raises:
        ModelError: the directory does not exist, or transformers cannot load or run the model.
    """

    def __init__(self, export: Path, device: torch.device, *, max_new_tokens: int, temperature: float) -> None:
        path = export / "export" if (export / "export" / "config.json").is_file() else export
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{export} contains no config.json; give a run's export/ or any LLaVA-NeXT directory, or write an "
                "export with `python -m train.export`"
            )
        dtype = "auto" if device.type == "cuda" else torch.float32
        try:
            vision = getattr(AutoConfig.from_pretrained(path), "vision_config", None)
            reason = None if vision is None else stock_unsupported_reason(vision)
            if reason is not None:
                raise ModelError(
                    f"stock transformers cannot run {path}: {reason}; `python -m train.evaluate RUN --generate 0` "
                    "computes its losses (for a directory without a run, add --store STORE)"
                )
            self._processor = load_processor(path)
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} could not be loaded: {' '.join(str(error).split())}") from error
        self._model = model.to(device).eval()
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature
        self._max_positions = int(self._model.config.text_config.max_position_embeddings)

    def answer(self, conversation: Conversation, question: str) -> Iterator[str]:
        """Yields the pieces of an answer as they are generated, then appends question and answer to the conversation.

        If the iterator is closed early, the text so far is the answer.

        Raises:
            ModelError: the conversation has no position left for an answer.
        """
        question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are not UTF-8
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not conversation.turns:
            content[:0] = [{"type": "image"} for _ in conversation.images]
        turns = [*conversation.turns, {"role": "user", "content": content}]
        inputs = self._make_inputs(turns, conversation.images)
        num_free = self._max_positions - inputs["input_ids"].shape[1]
        if num_free < 1:
            raise ModelError(
                f"the conversation has {inputs['input_ids'].shape[1]} tokens, but the model has {self._max_positions} "
                "positions; start a new conversation with /new"
            )
        options = self._options | {"max_new_tokens": min(num_free, self._options["max_new_tokens"])}
        streamer = TextIteratorStreamer(self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, errors = _StopOnEvent(), list[BaseException]()

        def generate() -> None:
            try:
                self._model.generate(
                    **inputs, **options, streamer=streamer, stopping_criteria=StoppingCriteriaList([stop])
                )
            except BaseException as error:
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True, name="answer")
        thread.start()
        written = ""
        try:
            for piece in streamer:
                written += piece
                yield piece
        finally:
            stop.event.set()
            thread.join()
            if errors:
                raise errors[0]
            conversation.turns[:] = [
                *turns,
                {"role": "assistant", "content": [{"type": "text", "text": written.strip()}]},
            ]

    def _make_inputs(self, turns: list[dict[str, Any]], images: Sequence[Image.Image]) -> Any:
        text = self._processor.apply_chat_template(turns, add_generation_prompt=True)
        # In a list of lists, each has the images of one sample. LLaVA-OneVision depends on it.
        pixels = {"images": [list(images)]} if images else {}
        special = should_add_special_tokens(self._processor.tokenizer, text)
        inputs = self._processor(text=text, return_tensors="pt", add_special_tokens=special, **pixels)
        return inputs.to(self._model.device, self._model.dtype)


def read_image(path: Path) -> Image.Image:
    """Reads and decodes an image file.

    Raises:
        ModelError: it cannot be read or decoded.
    """
    try:
        return decode(path.read_bytes())
    except UnidentifiedImageError as error:
        raise ModelError(f"{path} cannot be read as an image: its format is unknown") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise ModelError(f"{path} cannot be read as an image: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code, 2 for an invalid argument."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        conversation = Conversation([read_image(path) for path in options.images])
        chat = Chat(options.export, device, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
        if options.ask is not None:
            _print_answer(chat, conversation, options.ask)
        else:
            _read_questions(chat, conversation)
    except (ModelError, OSError) as error:
        return report_mistake(error)
    return 0


def _read_questions(chat: Chat, conversation: Conversation) -> None:
    """Reads lines until the end of the input. An error in one line is printed, and the next line is read."""
    is_interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if is_interactive:
        print(_HELP)
    while True:
        try:
            line = input("> " if is_interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        try:
            if word in ("/image", "/picture"):
                conversation = Conversation([read_image(Path(rest.strip()))])
            elif word == "/images":
                conversation = Conversation([read_image(Path(name)) for name in _split(rest)])
            elif word == "/new":
                conversation = Conversation(conversation.images)
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                _print_answer(chat, conversation, line)
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)


def _split(names: str) -> list[str]:
    """Splits names of files as a shell does."""
    try:
        return shlex.split(names)
    except ValueError as error:
        raise ModelError(f"/images {names}: {error}") from error


def _print_answer(chat: Chat, conversation: Conversation, question: str) -> None:
    """Prints an answer while it is generated. Ctrl-C ends it early."""
    answer = chat.answer(conversation, question)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
    print()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.chat", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "export",
        type=model_argument,
        metavar="EXPORT",
        help="a run folder, its export/, any LLaVA-NeXT directory, or the id of a fetched one on the hub",
    )
    parser.add_argument("images", type=path_argument, metavar="IMAGE", nargs="*", help="the images to ask about")
    parser.add_argument("--ask", metavar="QUESTION", help="answer one question and exit")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="maximum length of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 selects greedy decoding (%(default)s)")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature {options.temperature}: must be a finite number of at least 0")
    return options


if __name__ == "__main__":
    sys.exit(run_program(main))
