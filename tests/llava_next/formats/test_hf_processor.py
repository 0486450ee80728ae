"""The exported processor: transformers' processor, loaded from the export, makes the inputs of training."""

import copy
import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

from data_recipes.schema.sample import Message
from llava_next.config import ANYRES
from llava_next.formats.hugging_face import save_processor, write_hf, write_tokenizer_settings
from llava_next.formats.original import original_model
from llava_next.inputs.chat_template import template_from_tokenizer
from llava_next.inputs.conversation import TEMPLATES
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, build_model, read_backbone, read_tokenizer
from llava_next.model.llava_next import LlavaNext
from tests.jinja_shapes import LLAMA_3, MISTRAL, QWEN, ROUNDS_WITH_BOS, VICUNA, ZEPHYR
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, row
from tests.oracles import real_tokenizers
from tests.tiny import SIZES_HW, TokenizerName, TowerName, encode_noise_image

TOWERS: tuple[TowerName, ...] = ("clip", "siglip", "dinov2")


def _model(backbone: Backbone, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaNext:
    return build_model(backbone, dtype=dtype, seed=seed)


def _processor(backbone: Backbone) -> Processor:
    return backbone.processor(template=None, views=ANYRES, max_length=4096)


def _write(backbone: Backbone, folder: Path, seed: int = 0) -> LlavaNext:
    model = _model(backbone, seed)
    write_hf(model, backbone, _processor(backbone), folder)
    return model


# Texts of the user and the assistant, for one or two rounds.
QUESTION, ANSWER, SECOND = "What is in the picture?", "A red circle.", "And its colour?"


def _stock_ids(stock: LlavaNextProcessor, encoded: bytes, *, rounds: int, system: str | None) -> list[int]:
    content: list[dict[str, object]] = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages: list[dict[str, object]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    if rounds == 2:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": ANSWER}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": SECOND}]})
    text = stock.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.open(io.BytesIO(encoded))
    ids: list[int] = stock(images=image, text=text, return_tensors="pt")["input_ids"][0].tolist()
    content[0]["image"] = image
    tokenized = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tokenized["input_ids"][0] == ids
    return ids


WITH_BOS = sorted(name for name, template in TEMPLATES.items() if template.bos and not template.caption_only)
WITHOUT_BOS = sorted(name for name, template in TEMPLATES.items() if not template.bos)
NATURAL_PAIRS: list[tuple[str, TokenizerName]] = [
    *((name, "bytes") for name in (*WITH_BOS, *WITHOUT_BOS)),
    *((name, "metaspace") for name in WITH_BOS),
]
# A tokenizer that adds the beginning-of-sequence token, with a template that does not.
UNNATURAL_PAIRS = [(name, "metaspace") for name in WITHOUT_BOS]


@pytest.mark.parametrize(("template", "kind"), [*NATURAL_PAIRS, *UNNATURAL_PAIRS])
def test_stock_processor_makes_the_prompt_of_training(
    make_backbone: MakeBackbone, tmp_path: Path, template: str, kind: TokenizerName
) -> None:
    """Chat template and processor of the export give the ids of training: in every grid, in the first and the second
    round, with the default system text and with the sample's."""
    backbone = make_backbone(template=template, kind=kind)
    _write(backbone, tmp_path / "export")
    stock = LlavaNextProcessor.from_pretrained(tmp_path / "export")
    processor = _processor(backbone)
    systems = (None,) if processor.template.system_format is None else (None, "Answer in one word.")
    for number, size in enumerate(SIZES_HW):
        encode_noise_image_bytes = encode_noise_image(number, size)
        for rounds, system in itertools.product((1, 2), systems):
            messages = [Message("user", f"<image>\n{QUESTION}")]
            if system is not None:
                messages.insert(0, Message("system", system))
            if rounds == 2:
                messages += [Message("assistant", ANSWER), Message("user", SECOND)]
            actual, _ = processor.prompt(messages, [size])
            expected = _stock_ids(stock, encode_noise_image_bytes, rounds=rounds, system=system)
            assert expected == actual.tolist(), (size, rounds, system)


@pytest.mark.parametrize("jinja", [QWEN, LLAMA_3, VICUNA, ZEPHYR, MISTRAL, ROUNDS_WITH_BOS], ids=lambda text: text[:40])
def test_stock_processor_with_the_tokenizers_template(make_backbone: MakeBackbone, tmp_path: Path, jinja: str) -> None:
    """With `template: tokenizer`, the export gives the prompt of training, including white space, and its tokenizer has
    an equal template."""
    backbone = make_backbone(template="tokenizer")
    backbone.tokenizer.chat_template = jinja
    processor = _processor(backbone)
    write_hf(_model(backbone), backbone, processor, tmp_path / "export")
    stock = LlavaNextProcessor.from_pretrained(tmp_path / "export")
    size = SIZES_HW[4]
    systems = (None,) if processor.template.system_format is None else (None, "Answer in one word.\n")
    for rounds, system in itertools.product((1, 2), systems):
        messages = [Message("user", f"<image>\n{QUESTION}")]
        if system is not None:
            messages.insert(0, Message("system", system))
        if rounds == 2:
            messages += [Message("assistant", ANSWER), Message("user", SECOND)]
        actual, _ = processor.prompt(messages, [size])
        expected = _stock_ids(stock, encode_noise_image(4, size), rounds=rounds, system=system)
        assert expected == actual.tolist(), (rounds, system)
    again = Processor(read_tokenizer(str(tmp_path / "export")), processor.config)
    assert again.template == processor.template


def test_stock_processor_with_a_real_tokenizer(
    make_backbone: MakeBackbone, tmp_path: Path, smollm2_tokenizer: Path
) -> None:
    """SmolLM2's tokenizer, exported with the image token added, gives the same prompt and counts."""
    config = make_backbone().config
    config = replace(config, language_model=replace(config.language_model, tokenizer=str(smollm2_tokenizer)))
    backbone = read_backbone(config)
    _write(backbone, tmp_path / "export")
    stock = LlavaNextProcessor.from_pretrained(tmp_path / "export")
    for number, size in enumerate(SIZES_HW):
        actual, _ = _processor(backbone).prompt([Message("user", f"<image>\n{QUESTION}")], [size])
        expected = _stock_ids(stock, encode_noise_image(number, size), rounds=1, system=None)
        assert expected == actual.tolist(), size


@pytest.mark.parametrize("tower", TOWERS)
def test_stock_generation_from_the_export(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """`generate` of the stock model runs, and its first token is the most likely token of our model."""
    backbone = make_backbone(tower)
    model = _write(backbone, tmp_path / "export")
    stock = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "export")
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "export")
    sample = encoded(backbone, [(45, 61)])
    layout = sample.example.layout
    prompt = layout.ids[: int(np.flatnonzero(layout.labels >= 0)[0])]
    text = processor.tokenizer.decode([t for t in prompt if t != layout.image_token_id])
    text = text.replace("user\n", "user\n<image>", 1)
    inputs = processor(
        images=Image.open(io.BytesIO(sample.images[0])), text=text, return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip
    assert inputs["input_ids"][0].tolist() == prompt.tolist()
    answer = stock.generate(**inputs, max_new_tokens=3, do_sample=False)
    batch = row(backbone, [sample.example])
    assert int(answer[0, len(prompt)]) == int(model.target_logits(batch)[0].argmax())


def test_generation_stops_at_the_end_token(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The generation config of the export has the template's end token and the tokenizer's."""
    backbone = make_backbone(template="chatml")
    _write(backbone, tmp_path / "export")
    generation = GenerationConfig.from_pretrained(tmp_path / "export")
    ids = backbone.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert generation.eos_token_id == ids
    vicuna = make_backbone(template="vicuna_v1")
    _write(vicuna, tmp_path / "vicuna")
    assert GenerationConfig.from_pretrained(tmp_path / "vicuna").eos_token_id == ids[1]


REAL = [
    ("vicuna", "vicuna_v1"),
    ("mistral", "mistral_instruct"),
    *(
        pytest.param(name, template, marks=pytest.mark.full)
        for name, template in (
            ("vicuna_legacy", "vicuna_v1"),
            ("vicuna_chatml", "chatml_direct"),
            ("llama3", "llava_llama_3"),
            ("qwen", "qwen_1_5"),
            ("smollm2", "chatml"),
            # Pairs of template and tokenizer that are not published together.
            ("vicuna", "mistral_instruct"),
            ("vicuna_chatml", "chatml"),
            ("mistral", "vicuna_v1"),
        )
    ),
]
CONVERSATIONS = [
    [Message("user", f"<image>\n{QUESTION}")],
    [Message("user", f"<image>\n{QUESTION}"), Message("assistant", ANSWER), Message("user", SECOND)],
    [Message("system", "Answer in one word."), Message("user", f"<image>\n{QUESTION}")],
    [Message("system", "  Two spaces before it."), Message("user", f"<image>\n{QUESTION}")],
    [Message("user", "No image: 你好?")],
    [Message("user", "<image> first, then<image><image>\nthree of them")],
]
"""With one image, without, and with several inside the text; and texts with and without a leading word separator."""


@pytest.mark.parametrize(("name", "template"), REAL)
def test_real_tokenizers_render_the_prompt_of_training(
    make_backbone: MakeBackbone, tmp_path: Path, name: str, template: str
) -> None:
    """The exported processor gives the ids of training in each way of calling it, and so does the rendered text in the
    authors' layout. The exported chat template is parsed as the same template."""
    tokenizer = real_tokenizers.tokenizer(name)
    backbone = make_backbone(template=template)
    hf_config = copy.deepcopy(backbone.hf_config)
    hf_config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    backbone = replace(backbone, tokenizer=tokenizer, hf_config=hf_config)
    processor = _processor(backbone)
    save_processor(backbone, processor, tmp_path / "export")
    stock = AutoProcessor.from_pretrained(tmp_path / "export")
    original_tokenizer = original_model(backbone, processor).tokenizer
    original_tokenizer.save_pretrained(tmp_path / "original")
    write_tokenizer_settings(tmp_path / "original", original_tokenizer)
    original = AutoTokenizer.from_pretrained(tmp_path / "original")
    for messages in CONVERSATIONS:
        if processor.template.system_format is None and messages[0].role == "system":
            continue
        num_images = sum(message.text.count("<image>") for message in messages)
        sizes = list(SIZES_HW[:num_images])
        images = [Image.new("RGB", (width, height)) for height, width in sizes]
        expected = processor.prompt(messages, sizes)[0].tolist()
        turns = [{"role": message.role, "content": message.text} for message in messages]
        text = stock.apply_chat_template(turns, add_generation_prompt=True)
        image_options = {"images": images} if images else {}
        assert list(stock(text=text, **image_options)["input_ids"][0]) == expected, messages
        rendered = original.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = original(rendered)["input_ids"]
        layouts = iter(processor.prompt(messages, sizes)[1])
        widened = [[token] * (next(layouts).num_tokens if token == processor.image_token_id else 1) for token in ids]
        assert list(itertools.chain.from_iterable(widened)) == expected, messages
    reloaded = template_from_tokenizer(read_tokenizer(str(tmp_path / "export")))
    assert replace(reloaded, name="", released_specials=()) == replace(
        processor.template, name="", released_specials=()
    )
