"""`python -m train.chat EXPORT [PICTURE]`: a conversation about a picture, in the terminal, as the model writes it.

What answers is stock transformers with what the export brings: its model, its processor, its chat template. A line is
a question; an empty one is not asked. Owns the conversation; what a picture is, is `llava_next.inputs.anyres.decode`'s.
"""

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from llava_next.config import ModelError
from llava_next.inputs.anyres import decode
from llava_next.inputs.chat_template import adds_special_tokens
from llava_next.model.towers import unsupported_by_stock
from train.config.exit_codes import report_mistake
from train.distributed.quiet_libraries import quiet_libraries

_HELP = "/picture FILE: another picture, a new conversation   /new: a new conversation   /quit, Ctrl-D: the end"


class _WhenTold(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer that nobody waits for any more."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.told.is_set(), device=input_ids.device)


@dataclass
class Conversation:
    """What was said so far about a picture, or about none."""

    picture: Image.Image | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)


class Chat:
    """A directory that transformers loads, and talks to.

    Args:
        export: the directory, or the folder of a run that has written one.
        device: where it runs; on a CPU in float32, whatever the weights are in.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time.

    Raises:
        ModelError: there is no such directory, or transformers cannot load it.
    """

    def __init__(self, export: Path, device: torch.device, *, max_new_tokens: int, temperature: float) -> None:
        place = export / "export" if (export / "export" / "config.json").is_file() else export
        if not (place / "config.json").is_file():
            raise ModelError(
                f"{export} is no directory of a model, nor a run that has written one: it holds no config.json; name a "
                "run's export/, or write one with `python -m train.export`"
            )
        dtype = "auto" if device.type == "cuda" else torch.float32
        try:
            vision = getattr(AutoConfig.from_pretrained(place), "vision_config", None)
            why_not = None if vision is None else unsupported_by_stock(vision)
            if why_not is not None:
                raise ModelError(
                    f"{place} cannot answer in stock transformers: {why_not}; its losses are measured by "
                    "`python -m train.evaluate RUN --generate 0`, or of a directory without its run with --store STORE"
                )
            self._processor = AutoProcessor.from_pretrained(place)
            model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype)
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            raise ModelError(f"{place} could not be loaded: {' '.join(str(error).split())}") from error
        self._model = model.to(device).eval()
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature
        self._positions = int(self._model.config.text_config.max_position_embeddings)

    def answer(self, conversation: Conversation, question: str) -> Iterator[str]:
        """The pieces of an answer as they are written; at its end the conversation holds question and answer. Closed
        early, what was written so far is the answer.

        Raises:
            ModelError: the conversation is longer than the model's positions.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if conversation.picture is not None and not conversation.turns:
            content.insert(0, {"type": "image"})
        turns = [*conversation.turns, {"role": "user", "content": content}]
        inputs = self._inputs(turns, conversation.picture)
        room = self._positions - inputs["input_ids"].shape[1]
        if room < 1:
            raise ModelError(
                f"the conversation has {inputs['input_ids'].shape[1]} tokens, the model {self._positions} positions; "
                "begin a new one with /new"
            )
        options = self._options | {"max_new_tokens": min(room, self._options["max_new_tokens"])}
        streamer = TextIteratorStreamer(self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failure = _WhenTold(), list[BaseException]()

        def generate() -> None:
            try:
                self._model.generate(
                    **inputs, **options, streamer=streamer, stopping_criteria=StoppingCriteriaList([stop])
                )
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True, name="answer")
        thread.start()
        written = ""
        try:
            for piece in streamer:
                written += piece
                yield piece
        finally:
            stop.told.set()
            thread.join()
            if failure:
                raise failure[0]
            conversation.turns[:] = [
                *turns,
                {"role": "assistant", "content": [{"type": "text", "text": written.strip()}]},
            ]

    def _inputs(self, turns: list[dict[str, Any]], picture: Image.Image | None) -> Any:
        text = self._processor.apply_chat_template(turns, add_generation_prompt=True)
        images = {} if picture is None else {"images": [picture]}
        special = adds_special_tokens(self._processor.tokenizer, text)
        inputs = self._processor(text=text, return_tensors="pt", add_special_tokens=special, **images)
        return inputs.to(self._model.device, self._model.dtype)


def read_picture(path: Path) -> Image.Image:
    """The picture in a file.

    Raises:
        ModelError: there is none.
    """
    try:
        return decode(path.read_bytes())
    except (OSError, Image.DecompressionBombError) as error:
        raise ModelError(f"{path} is no picture that can be read: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 2 for a mistake."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        conversation = Conversation(read_picture(options.picture) if options.picture else None)
        chat = Chat(options.export, device, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
        if options.ask is not None:
            _say(chat, conversation, options.ask)
        else:
            _talk(chat, conversation)
    except ModelError as error:
        return report_mistake(error)
    return 0


def _talk(chat: Chat, conversation: Conversation) -> None:
    """Reads lines until their end. A mistake in one is told, and the next is read."""
    by_hand = sys.stdin.isatty()
    if by_hand:
        print(_HELP)
    while True:
        try:
            line = input("> " if by_hand else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        try:
            if word == "/picture":
                conversation = Conversation(read_picture(Path(rest.strip())))
            elif word == "/new":
                conversation = Conversation(conversation.picture)
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                _say(chat, conversation, line)
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)


def _say(chat: Chat, conversation: Conversation, question: str) -> None:
    """Prints an answer as it comes. Ctrl-C cuts it off."""
    answer = chat.answer(conversation, question)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
    print()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.chat", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("export", type=Path, metavar="EXPORT", help="a run's folder, its export/, or any LLaVA-NeXT")
    parser.add_argument("picture", type=Path, metavar="PICTURE", nargs="?", help="what is talked about")
    parser.add_argument("--ask", metavar="QUESTION", help="one question, its answer, and the end")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    if options.temperature < 0:
        parser.error(f"--temperature {options.temperature}: must be 0 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
