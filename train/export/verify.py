"""Whether an export is what was exported: every tensor, and what stock transformers makes of pictures with it.

Tensors are compared one by one, in the memory of the largest, twice. For the logits the model is loaded once, in fp32
whatever its files hold (4 bytes a parameter, and a tenth for what is computed), first as stock transformers runs it,
then packed as training does. Where the host or the job's limit leaves less, they are not compared, and that is said.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_recipes.schema.sample import Message
from llava_next.config import ModelError
from llava_next.formats.hugging_face import wrapped
from llava_next.formats.tensors import LazyTensor, read_folder
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import Processor
from llava_next.model.llava_next import LlavaNext
from llava_next.model.towers import unsupported_by_stock
from train.export.exported_model import Source

TOLERANCE = 1e-4
"""‖a - b‖ / ‖b‖ of logits in fp32: two orders of the same sums, over dozens of layers."""
_SHAPES = ((1.5, 2.0), (0.6, 2.4), (2.4, 0.7), (0.5, 0.5))
"""(height, width) of the pictures, in tiles: among them several grids and sizes that are cut off unevenly."""
_GIB = 2**30


def verify_tensors(folder: Path, tensors: Sequence[LazyTensor]) -> str:
    """Compares what lies in the folder with what was to be written, byte for byte; returns a sentence.

    Raises:
        ModelError: a tensor is missing, left over or different.
    """
    found = read_folder(folder)
    different = sorted({tensor.name for tensor in tensors} ^ set(found))
    if different:
        raise ModelError(f"{folder}: {different[0]} is not in both, the export and its source ({len(different)} such)")
    for tensor in tensors:
        written, wanted = found[tensor.name].value(), tensor.value()
        if written.dtype != wanted.dtype or written.shape != wanted.shape or not _same_bytes(written, wanted):
            raise ModelError(f"{folder}: {tensor.name} is not what its source has; the disk or the memory is at fault")
    return f"{len(tensors)} tensors are equal, byte for byte, to those of the source"


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def verify_logits(folder: Path, source: Source) -> str:
    """Loads a Hugging Face export with stock transformers, and compares its prompt, its pixels' logits and ours.

    Raises:
        ModelError: a tensor that transformers would make up or leave out; another prompt; other logits.
    """
    needed = 1.1 * sum(4 * int(np.prod(tensor.shape)) for tensor in source.tensors)
    free = available_bytes()
    if needed > free:
        return f"logits NOT compared: loading it in fp32 takes {needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free"
    stock, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {key: value for key, value in found.items() if value}
    if problems:
        raise ModelError(f"{folder}: stock transformers does not load it whole: {problems}")
    why_not = unsupported_by_stock(stock.config.vision_config)
    if why_not is not None:
        return f"stock transformers loads it whole; logits NOT compared, because it cannot run: {why_not}"
    if source.config is None or source.processor is None or source.backbone is None:
        return "stock transformers loads it whole; logits NOT compared: no run is known that says how it is prompted"
    processor = source.backbone.processor(
        template=source.config.stage.template,
        image_mode=source.config.stage.image_mode,
        max_length=source.backbone.max_positions,
    )
    asked = [_Asked(processor, folder, shape) for shape in _SHAPES]
    with torch.no_grad():
        theirs = [question.stock_logits(stock.eval()) for question in asked]
    model = wrapped(stock, source.config.model, folder)  # it cuts the tower: stock runs no more
    worst = 0.0
    for question, logits in zip(asked, theirs, strict=True):
        ours = question.our_logits(model)
        worst = max(worst, float((ours - logits).norm() / logits.norm()))
    if not worst <= TOLERANCE:
        raise ModelError(f"{folder}: logits of stock transformers and ours differ by {worst:.1e} of their norm")
    sizes = ", ".join(f"{height}x{width}" for height, width in (question.size_hw for question in asked))
    return (
        f"stock transformers loads it whole, renders our prompt, and its logits are ours (largest difference "
        f"{worst:.1e} of their norm, fp32, pictures of {sizes})"
    )


class _Asked:
    """One picture and a question about it, for both sides."""

    def __init__(self, processor: Processor, folder: Path, shape: tuple[float, float]) -> None:
        tile = processor.config.tile
        self.size_hw = (max(1, int(shape[0] * tile)), max(1, int(shape[1] * tile)))
        noise = np.random.default_rng(0).integers(0, 256, (*self.size_hw, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "PNG")
        self._picture = stream.getvalue()
        question = Message("user", "<image>\nWhat is shown?")
        messages = [question, Message("assistant", "Noise, in three colours.")]
        self._config = processor.config
        self.example = processor.encode(messages, [self.size_hw], [self._picture])
        prompt, _ = processor.prompt([question], [self.size_hw])
        self._pixels = _stock_inputs(folder, Image.open(io.BytesIO(self._picture)), prompt.tolist())

    def stock_logits(self, stock: Any) -> torch.Tensor:
        """At the supervised positions, [L, V]."""
        ids = torch.from_numpy(self.example.layout.ids.astype(np.int64))[None]
        pixels = {key: value for key, value in self._pixels.items() if key in ("pixel_values", "image_sizes")}
        logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits
        assert isinstance(logits, torch.Tensor)
        return logits[0, self._batch().target_positions]

    def our_logits(self, model: LlavaNext) -> torch.Tensor:
        """The same of the packed model."""
        return model.target_logits(self._batch())

    def _batch(self) -> Any:
        config = self._config
        return collate([self.example], tile=config.tile, patches_per_tile=config.patches_per_side**2)


def _stock_inputs(folder: Path, image: Image.Image, prompt: list[int]) -> Any:
    """What the stock processor makes of the question, in both of the ways in which users call it: as one call, and as
    text that is given back to the processor.

    Raises:
        ModelError: either gives other ids than the prompt of the training.
    """
    stock = AutoProcessor.from_pretrained(folder)
    words = {"type": "text", "text": "What is shown?"}

    def render(shown: dict[str, Any], **options: Any) -> Any:
        turn = {"role": "user", "content": [shown, words]}
        return stock.apply_chat_template([turn], add_generation_prompt=True, **options)

    text = render({"type": "image"}, tokenize=False)
    inputs = stock(images=image, text=text, return_tensors="pt")
    tokenized = render({"type": "image", "image": image}, tokenize=True, return_dict=True, return_tensors="pt")
    for call, ids in (("processor(images, text)", inputs), ("apply_chat_template(tokenize=True)", tokenized)):
        if ids["input_ids"][0].tolist() != prompt:
            raise ModelError(
                f"{folder}: {call} gives another prompt than the training had; rendered: {text!r}; first ids "
                f"{ids['input_ids'][0, :4].tolist()}, in training {prompt[:4]}"
            )
    return inputs


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: the host's, or what its control groups (a Slurm job, a container) leave.

    Args:
        root: of the file system that holds proc/ and sys/.
    """
    found = [int(line.split()[1]) * 1024 for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        names = _GROUP_FILES[controllers]
        for folder in (top / group.strip("/"), *(top / group.strip("/")).parents):
            if all((folder / name).is_file() for name in names):
                limit, used, stat = ((folder / name).read_text() for name in names)
                cached = dict(entry.split() for entry in stat.splitlines())
                if limit.strip() != "max":
                    found.append(int(limit) - int(used) + int(cached.get(_CACHED[controllers], 0)))
            if folder == top:
                break
    return max(0, min(found, default=0))


_GROUP_FILES = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}
_CACHED = {"": "inactive_file", "memory": "total_inactive_file"}
"""Pages of files that count as used, and that the kernel takes back."""


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
