"""Verifies an export: compares every tensor with its source, and the logits of stock transformers with ours.

Tensors are compared one at a time. For the logits, the model is loaded in fp32 (4 bytes per parameter and 10 % for the
computation) and runs in stock transformers, then packed as in training. With less free memory the logits are not
compared, and a sentence says so.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from data_recipes.schema.sample import Message
from llava_next.config import ModelError
from llava_next.formats.hugging_face import wrap_stock_model
from llava_next.formats.onevision import load_processor
from llava_next.formats.tensors import LazyTensor, read_folder
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import Processor
from llava_next.model.llava_next import LlavaNext
from llava_next.model.towers import stock_unsupported_reason
from train.distributed.free_memory import available_bytes
from train.export.exported_model import ExportedModel

TOLERANCE = 1e-4
"""Largest ‖a - b‖ / ‖b‖ of fp32 logits; the two paths add the same terms in another order, over dozens of layers."""
_SHAPES = ((1.5, 2.0), (0.6, 2.4), (2.4, 0.7), (0.5, 0.5))
"""(height, width) of the test images in tiles; they cover several grids and uneven crops."""
_SET = _SHAPES[:2]
"""Images of a test with several, where the views of several images have a rule of their own."""
_PIXEL_KEYS = ("pixel_values", "image_sizes", "batch_num_images")
_GIB = 2**30


def verify_tensors(folder: Path, tensors: Sequence[LazyTensor]) -> str:
    """Compares the tensors in the folder with the source byte for byte; returns a sentence that says so.

    Raises:
        ModelError: a tensor is missing, unexpected or different.
    """
    written_tensors = read_folder(folder)
    different = sorted({tensor.name for tensor in tensors} ^ set(written_tensors))
    if different:
        raise ModelError(
            f"{folder}: {len(different)} tensors are in only one of export and source, for example {different[0]}"
        )
    for tensor in tensors:
        written, expected = written_tensors[tensor.name].value(), tensor.value()
        if written.dtype != expected.dtype or written.shape != expected.shape or not _has_same_bytes(written, expected):
            raise ModelError(f"{folder}: {tensor.name} differs from its source; check the disk and the memory")
    return f"{len(tensors)} tensors are equal, byte for byte, to those of the source"


def _has_same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def verify_logits(folder: Path, source: ExportedModel) -> str:
    """Loads a Hugging Face export in stock transformers and compares prompts and logits with ours.

    Returns:
        A sentence that says what was compared, or why not.

    Raises:
        ModelError: transformers would initialize or ignore a tensor; a prompt or the logits differ.
    """
    needed = 1.1 * sum(4 * int(np.prod(tensor.shape)) for tensor in source.tensors)
    free = available_bytes()
    if needed > free:
        return f"logits NOT compared: loading it in fp32 takes {needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free"
    stock, loading_info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: value for key, value in loading_info.items() if value}
    if problems:
        raise ModelError(f"{folder}: stock transformers does not load all tensors: {problems}")
    reason = stock_unsupported_reason(stock.config.vision_config)
    if reason is not None:
        return f"stock transformers loads all tensors; logits NOT compared, because it cannot run: {reason}"
    if source.config is None or source.processor is None or source.backbone is None:
        return "stock transformers loads all tensors; logits NOT compared: without a run, its prompts are unknown"
    processor = source.backbone.processor(
        template=source.config.stage.template,
        views=source.config.stage.views,
        max_length=source.backbone.max_positions,
    )
    views = processor.config.views
    sets = [_SET] if len(set(views.rules)) > 1 else []
    questions = [_ImageQuestion(processor, folder, shapes) for shapes in (*((shape,) for shape in _SHAPES), *sets)]
    with torch.no_grad():
        stock_logits = [question.compute_stock_logits(stock.eval()) for question in questions]
    # Wrapping removes tower layers, so the stock model cannot run afterwards.
    model = wrap_stock_model(stock, source.config.model, folder)
    worst = 0.0
    for question, logits in zip(questions, stock_logits, strict=True):
        our_logits = question.compute_our_logits(model)
        worst = max(worst, float((our_logits - logits).norm() / logits.norm()))
    if not worst <= TOLERANCE:
        raise ModelError(f"{folder}: logits of stock transformers and ours differ by {worst:.1e} of their norm")
    sizes = ", ".join(
        " and ".join(f"{height}x{width}" for height, width in question.sizes_hw) for question in questions
    )
    return (
        f"stock transformers loads all tensors, renders the training's prompt, and gives the same logits (largest "
        f"difference {worst:.1e} of their norm, fp32, images of {sizes})"
    )


class _ImageQuestion:
    """One or several images and a question about them, encoded by our processor and by the stock one."""

    def __init__(self, processor: Processor, folder: Path, shapes: Sequence[tuple[float, float]]) -> None:
        tile = processor.config.tile
        self.sizes_hw = [(max(1, int(height * tile)), max(1, int(width * tile))) for height, width in shapes]
        images = [_make_noise_image(size_hw) for size_hw in self.sizes_hw]
        question = Message("user", "<image>\n" * len(images) + "What is shown?")
        messages = [question, Message("assistant", "Noise, in three colours.")]
        self._config = processor.config
        self.example = processor.encode(messages, self.sizes_hw, images)
        prompt, _ = processor.prompt([question], self.sizes_hw)
        self._pixels = _encode_with_stock(folder, [Image.open(io.BytesIO(image)) for image in images], prompt.tolist())

    def compute_stock_logits(self, stock: Any) -> torch.Tensor:
        """Returns the logits at the supervised positions, [num_supervised, V]."""
        ids = torch.from_numpy(self.example.layout.ids.astype(np.int64))[None]
        pixels = {key: value for key, value in self._pixels.items() if key in _PIXEL_KEYS}
        logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits
        assert isinstance(logits, torch.Tensor)
        return logits[0, self._make_batch().target_positions]

    def compute_our_logits(self, model: LlavaNext) -> torch.Tensor:
        """Returns the same logits of the packed model."""
        return model.target_logits(self._make_batch())

    def _make_batch(self) -> Any:
        config = self._config
        return collate([self.example], tile=config.tile, patches_per_tile=config.patches_per_side**2)


def _make_noise_image(size_hw: tuple[int, int]) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def _encode_with_stock(folder: Path, images: Sequence[Image.Image], prompt: list[int]) -> Any:
    """Encodes the question with the stock processor, with `apply_chat_template` alone and with rendered text.

    Returns:
        The inputs that the processor makes of the rendered text.

    Raises:
        ModelError: the ids of one way differ from the training's prompt.
    """
    stock = load_processor(folder)
    text_part = {"type": "text", "text": "What is shown?"}

    def render(image_parts: Sequence[dict[str, Any]], **options: Any) -> Any:
        turn = {"role": "user", "content": [*image_parts, text_part]}
        return stock.apply_chat_template([turn], add_generation_prompt=True, **options)

    text = render([{"type": "image"}] * len(images), tokenize=False)
    # A LLaVA-OneVision cuts each image of a flat list with AnyRes; the images of one sample are a list in the list.
    inputs = stock(images=images[0] if len(images) == 1 else [list(images)], text=text, return_tensors="pt")
    image_parts = [{"type": "image", "image": image} for image in images]
    tokenized = render(image_parts, tokenize=True, return_dict=True, return_tensors="pt")
    for call, ids in (("processor(images, text)", inputs), ("apply_chat_template(tokenize=True)", tokenized)):
        if ids["input_ids"][0].tolist() != prompt:
            raise ModelError(
                f"{folder}: the prompt of {call} differs from the training's; rendered text: {text!r}; first ids "
                f"{ids['input_ids'][0, :4].tolist()}, in training {prompt[:4]}"
            )
    return inputs
