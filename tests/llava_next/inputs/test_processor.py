"""Encoding of messages and image sizes: ids, labels and counts, which are the same with and without pixels."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from data_recipes.schema.sample import Message
from llava_next.config import ANYRES, AUTHORS_GRIDS, ModelError, ProcessorConfig, ViewsConfig
from llava_next.inputs.anyres import NEWLINE, image_layout
from llava_next.inputs.conversation import TEMPLATES, Segment
from llava_next.inputs.processor import IGNORE, Processor, RejectReason, SampleLayout, SampleRejected
from llava_next.model.build import read_tokenizer
from tests.tiny import PATCHES_PER_SIDE, SIZES_HW, TILE, TokenizerName, encode_noise_image, tiny_tokenizer

SIZE = (45, 61)
MEAN_COLOUR = (122, 116, 104)
MIXED_VIEWS = (
    ViewsConfig("squash", "squash"),
    ViewsConfig("anyres_max_1", "anyres"),
    ViewsConfig("anyres", "anyres_max_2"),
    ViewsConfig("anyres_max_1", "pad", closing_newline=True),
    ViewsConfig("pad", "crop"),
    ViewsConfig("crop", "squash", closing_newline=True),
)
NUM_IMAGE_TOKENS = image_layout(
    SIZE, mode="anyres", grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=PATCHES_PER_SIDE
).num_tokens


def _processor(tokenizer_path: Path, template: str, max_length: int = 4096, views: ViewsConfig = ANYRES) -> Processor:
    config = ProcessorConfig(
        template=template,
        views=views,
        grids=AUTHORS_GRIDS,
        tile=TILE,
        patches_per_side=PATCHES_PER_SIDE,
        max_length=max_length,
        pad_colour=MEAN_COLOUR if "pad" in views.modes else None,
    )
    return Processor(read_tokenizer(str(tokenizer_path)), config)


def _rounds(*turns: str, with_image: bool = True) -> list[Message]:
    messages = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(turns)]
    if with_image:
        messages[0] = Message("user", "<image>\n" + messages[0].text)
    return messages


# Answers that begin with a letter, a digit, a quote, another script or an emoji, and one with a line break.
ANSWERS = ["A red circle.", "42", '"Quoted," he said.', "你好，世界", "🙂 fine", "line one\nline two", "é"]


def _supervised_runs(layout: SampleLayout) -> list[list[int]]:
    """The ids of each contiguous run of supervised positions."""
    runs: list[list[int]] = []
    for position in np.flatnonzero(layout.labels != IGNORE):
        if runs and layout.labels[position - 1] != IGNORE:
            runs[-1].append(int(layout.ids[position]))
        else:
            runs.append([int(layout.ids[position])])
    return runs


def _check_supervision(processor: Processor, answers: Sequence[str]) -> None:
    template = processor.template
    turns = [turn for answer in answers for turn in (f"Question {len(answer)}?", answer)]
    layout = processor.layout(_rounds(*turns), [SIZE])
    assert (layout.labels[layout.labels != IGNORE] == layout.ids[layout.labels != IGNORE]).all()
    runs = _supervised_runs(layout)
    if template.caption_only:  # captions follow each other directly
        assert len(runs) == 1
        assert processor.tokenizer.decode(runs[0]).strip() == "\n".join(answers).strip()
        return
    decoded = [processor.tokenizer.decode(run) for run in runs]
    expected = [template.answer_format.replace("{text}", answer) + template.end for answer in answers]
    # A sentencepiece decoder drops a leading space.
    assert [text.removeprefix(" ") for text in decoded] == [text.removeprefix(" ") for text in expected]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_text_is_answers_and_end_tokens(tmp_path: Path, template: str, kind: TokenizerName) -> None:
    """Each supervised run decodes to one answer with its end token, without text of a question or a header."""
    _check_supervision(_processor(tiny_tokenizer(tmp_path / kind, kind), template), ANSWERS)


@pytest.mark.parametrize("template", ["chatml", "qwen_1_5", "chatml_direct"])
def test_supervised_text_with_a_real_tokenizer(smollm2_tokenizer: Path, template: str) -> None:
    """The same with SmolLM2's tokenizer."""
    _check_supervision(_processor(smollm2_tokenizer, template), ANSWERS)


def test_labels_do_not_depend_on_a_post_processor(tmp_path: Path) -> None:
    """A byte-level post-processor can report offsets without white space; the labels are the same."""
    layouts = []
    for trims in (False, True):
        folder = tiny_tokenizer(tmp_path / str(trims), "bytes")
        engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
        engine.post_processor = processors.ByteLevel(trim_offsets=trims)
        engine.save(str(folder / "tokenizer.json"))
        layouts.append(_processor(folder, "chatml").layout(_rounds("What?", "one\n\n  two \n"), [SIZE]))
    np.testing.assert_array_equal(layouts[0].labels, layouts[1].labels)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_equal_those_of_the_complete_text(tmp_path: Path, template: str, kind: TokenizerName) -> None:
    """Tokenizing the rendered text at once and repeating each image token gives the same ids."""
    processor = _processor(tiny_tokenizer(tmp_path / kind, kind), template)
    messages = _rounds("What is it?", "A red circle.", "And now?", "Blue.")
    text = "".join(segment.text for segment in processor.template.render(messages))
    whole = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = [processor.tokenizer.bos_token_id] if processor.template.bos else []
    for token in whole:
        expected += [token] * (NUM_IMAGE_TOKENS if token == processor.image_token_id else 1)
    assert processor.layout(messages, [SIZE]).ids.tolist() == expected


@pytest.mark.parametrize("supervised", [False, True])
def test_token_across_segments_belongs_to_its_last_character(tmp_path: Path, supervised: bool) -> None:
    """The piece "▁ASSISTANT:" begins with the space of the previous segment and belongs to the segment of its
    letters."""
    processor = _processor(tiny_tokenizer(tmp_path, "metaspace"), "chatml")
    segments = [Segment("Hi, ", not supervised), Segment("ASSISTANT:", supervised)]
    ids, labels, _ = processor._tokens(segments, [])
    assert processor.tokenizer.convert_ids_to_tokens(int(ids[-1])) == "▁ASSISTANT:"
    assert (labels[-1] != IGNORE) == supervised
    assert ((labels[:-1] == IGNORE) == supervised).all()


def test_plain_supervises_the_caption_and_its_line_break(tmp_path: Path) -> None:
    """Stage 1: the beginning-of-sequence token and the image are masked, caption and line break are supervised, and
    there is no end token."""
    processor = _processor(tiny_tokenizer(tmp_path), "plain")
    layout = processor.layout(_rounds("Describe it.", "A red circle."), [SIZE])
    assert layout.ids[0] == processor.tokenizer.bos_token_id
    assert (layout.ids[1 : 1 + NUM_IMAGE_TOKENS] == processor.image_token_id).all()
    assert (layout.labels[: 1 + NUM_IMAGE_TOKENS] == IGNORE).all()
    rest = layout.ids[1 + NUM_IMAGE_TOKENS :]
    np.testing.assert_array_equal(layout.labels[1 + NUM_IMAGE_TOKENS :], rest)
    assert processor.tokenizer.decode(rest) == "A red circle.\n"


def test_captions_with_a_tokenizer_without_bos(tmp_path: Path) -> None:
    """Qwen's tokenizer has no beginning-of-sequence token; the image then comes first, as in the authors' code."""
    processor = _processor(tiny_tokenizer(tmp_path, bos=None), "plain")
    layout = processor.layout(_rounds("Describe it.", "A red circle."), [SIZE])
    assert (layout.ids[:NUM_IMAGE_TOKENS] == processor.image_token_id).all()
    assert processor.tokenizer.decode(layout.ids[NUM_IMAGE_TOKENS:]) == "A red circle.\n"
    assert layout.num_supervised == len(layout.ids) - NUM_IMAGE_TOKENS
    text_only = processor.layout([Message("user", "Say it."), Message("assistant", "A red circle.")], [])
    assert text_only.num_supervised == len(text_only.ids) - 1  # the first token has no preceding position


def test_every_template_except_captions_has_an_end_token(tmp_path: Path) -> None:
    """The last supervised token is the end token, at which generation stops."""
    assert {name for name, template in TEMPLATES.items() if not template.end} == {"plain"}
    for name in sorted(set(TEMPLATES) - {"plain"}):
        processor = _processor(tiny_tokenizer(tmp_path / name), name)
        layout = processor.layout(_rounds("What?", "That."), [SIZE])
        assert processor.tokenizer.decode(layout.labels[layout.labels != IGNORE][-1]) == TEMPLATES[name].end


def test_mistral_supervises_the_space_before_the_end(tmp_path: Path) -> None:
    """The tokens between the last word of an answer and </s> are supervised."""
    processor = _processor(tiny_tokenizer(tmp_path), "mistral_instruct")
    layout = processor.layout(_rounds("What?", "Blue."), [SIZE])
    assert processor.tokenizer.decode(layout.labels[layout.labels != IGNORE]) == " Blue. </s>"


@pytest.mark.parametrize("views", [ANYRES, *MIXED_VIEWS], ids=str)
def test_counts_with_and_without_pixels_are_equal(tmp_path: Path, views: ViewsConfig) -> None:
    """`encode` gives the ids, labels and counts of `layout`, and as many tiles as counted, in every grid."""
    processor = _processor(tiny_tokenizer(tmp_path), "chatml", views=views)
    for number, size in enumerate(SIZES_HW):
        other = SIZES_HW[number - 1]
        messages = _rounds("Compare <image> with it.", "They differ.", "Sure?", "Yes.")
        encode_noise_images = [encode_noise_image(number, size), encode_noise_image(number + 50, other)]
        layout = processor.layout(messages, [size, other])
        example = processor.encode(messages, [size, other], encode_noise_images)
        np.testing.assert_array_equal(example.layout.ids, layout.ids)
        np.testing.assert_array_equal(example.layout.labels, layout.labels)
        assert example.tiles.shape == (layout.num_tiles, TILE, TILE, 3)
        num_image_tokens = int((layout.ids == layout.image_token_id).sum())
        assert num_image_tokens == sum(image.num_tokens for image in layout.images)
        assert layout.num_tokens == len(layout.ids) == len(layout.labels)


def test_text_only_samples_have_no_tiles(tmp_path: Path) -> None:
    """Without an image there are no tiles and no image tokens."""
    example = _processor(tiny_tokenizer(tmp_path), "chatml").encode(_rounds("Hi", "Ho", with_image=False), [], [])
    assert example.tiles.shape == (0, TILE, TILE, 3)
    assert example.layout.images == ()
    assert not (example.layout.ids == example.layout.image_token_id).any()


def test_long_sample_is_truncated_after_an_answer(tmp_path: Path) -> None:
    """For every maximum length, the result is a prefix that ends with an end token, and removed rounds are counted."""
    path = tiny_tokenizer(tmp_path)
    messages = _rounds("Q one?", "First.", "Q two?", "Second, longer.", "Q three?", "Third.")
    whole = _processor(path, "chatml").layout(messages, [SIZE])
    end = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("<|im_end|>")
    ends = np.flatnonzero(whole.labels == end) + 1
    assert len(ends) == 3
    for max_length in range(int(ends[0]), len(whole.ids) + 3):
        layout = _processor(path, "chatml", max_length).layout(messages, [SIZE])
        assert layout.num_tokens <= max_length
        np.testing.assert_array_equal(layout.ids, whole.ids[: layout.num_tokens])
        np.testing.assert_array_equal(layout.labels, whole.labels[: layout.num_tokens])
        if max_length >= len(whole.ids):
            assert (layout.num_tokens, layout.num_rounds_cut) == (len(whole.ids), 0)
        else:
            fitting = int((ends <= max_length).sum())
            assert (layout.num_tokens, layout.num_rounds_cut) == (ends[fitting - 1], 3 - fitting)


def test_images_of_removed_rounds_are_removed(tmp_path: Path) -> None:
    """Truncation before the second image keeps layout and tiles of the first image only."""
    path = tiny_tokenizer(tmp_path)
    messages = _rounds("One?", "First.", "<image>\nTwo?", "Second.")
    sizes, encode_noise_images = [SIZE, (56, 56)], [encode_noise_image(0, SIZE), encode_noise_image(1, (56, 56))]
    whole = _processor(path, "chatml").encode(messages, sizes, encode_noise_images)
    assert len(whole.layout.images) == 2
    cut = _processor(path, "chatml", whole.layout.num_tokens - 10).encode(messages, sizes, encode_noise_images)
    assert cut.layout.images == whole.layout.images[:1]
    assert cut.layout.num_rounds_cut == 1
    np.testing.assert_array_equal(cut.tiles, whole.tiles[: len(cut.tiles)])
    assert len(cut.tiles) == cut.layout.num_tiles


def test_sample_without_a_fitting_answer_is_rejected(tmp_path: Path) -> None:
    """The reason is too_long, with both numbers."""
    path = tiny_tokenizer(tmp_path)
    messages = _rounds("Q?", "A.")
    length = _processor(path, "chatml").layout(messages, [SIZE]).num_tokens
    with pytest.raises(SampleRejected, match=f"{length} tokens.*{length - 2}") as caught:
        _processor(path, "chatml", length - 2).layout(messages, [SIZE])
    assert caught.value.reason is RejectReason.TOO_LONG


def test_the_rule_follows_the_number_of_images(tmp_path: Path) -> None:
    """A sample with one image has the tokens of `single`, one with several those of `several`, also where the maximum
    length leaves only one of them; without a rule for several images the sample is rejected with a reason."""
    path, sizes = tiny_tokenizer(tmp_path), [(56, 56), (45, 61)]
    views = ViewsConfig("anyres", "pad", closing_newline=True)
    processor = _processor(path, "chatml", views=views)
    one = _rounds("What is it?", "A red circle.")
    two = [*_rounds("What is it?", "A red circle."), *_rounds("And this?", "A blue square.")]
    patches = PATCHES_PER_SIDE**2
    assert [image.num_tokens for image in processor.layout(one, sizes[:1]).images] == [patches + 8 * 9]
    whole = processor.layout(two, sizes)
    assert [image.num_tokens for image in whole.images] == [patches + 1, patches + 1]
    assert [image.token_sources()[-1] for image in whole.images] == [NEWLINE, NEWLINE]
    cut = _processor(path, "chatml", len(whole.ids) - 5, views).layout(two, sizes)
    assert cut.num_rounds_cut == 1
    assert cut.images == whole.images[:1]
    refusing = _processor(path, "chatml", views=ViewsConfig("anyres"))
    assert refusing.layout(one, sizes[:1]).images == processor.layout(one, sizes[:1]).images
    text_only = _rounds("Hi", "Ho", with_image=False)
    assert refusing.layout(text_only, []).images == processor.layout(text_only, []).images == ()
    with pytest.raises(SampleRejected, match=r"2 images, and stage\.views\.several has no value") as caught:
        refusing.layout(two, sizes)
    assert caught.value.reason is RejectReason.SEVERAL_IMAGES


def test_sample_without_an_answer_is_rejected(tmp_path: Path) -> None:
    """A sample without supervised tokens is rejected with a reason."""
    with pytest.raises(SampleRejected) as caught:
        _processor(tiny_tokenizer(tmp_path), "chatml").layout(_rounds("Q?"), [SIZE])
    assert caught.value.reason is RejectReason.NO_SUPERVISED


@pytest.mark.parametrize("num_sizes", [0, 2])
def test_numbers_of_placeholders_and_images_must_agree(tmp_path: Path, num_sizes: int) -> None:
    """One placeholder with no image or two images is an error with both numbers."""
    with pytest.raises(ModelError, match=f"1 placeholders .* {num_sizes} images"):
        _processor(tiny_tokenizer(tmp_path), "chatml").layout(_rounds("Q?", "A."), [SIZE] * num_sizes)


def test_fingerprint_depends_on_all_settings(tmp_path: Path) -> None:
    """Another maximum length, template, mode, grid, tile or tokenizer gives another fingerprint."""
    path = tiny_tokenizer(tmp_path / "a")
    base = _processor(path, "chatml")
    tokenizer = base.tokenizer
    changed = [
        Processor(tokenizer, replace(base.config, **change))
        for change in (
            {"max_length": 4095},
            {"template": "qwen_1_5"},
            {"views": ViewsConfig("crop", "crop")},
            {"views": ViewsConfig("anyres")},
            {"grids": AUTHORS_GRIDS[::-1]},
            {"tile": 42},
            {"patches_per_side": 2},
        )
    ]
    changed += [_processor(path, "chatml", views=views) for views in MIXED_VIEWS]
    changed.append(_processor(tiny_tokenizer(tmp_path / "b", "metaspace"), "chatml"))
    fingerprints = [processor.fingerprint for processor in (base, *changed)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert _processor(path, "chatml").fingerprint == base.fingerprint


def test_fingerprint_follows_what_the_tokenizers_engine_does_not_hold(tmp_path: Path) -> None:
    """The beginning-of-sequence token and the chat template are the tokenizer's own, and not in its engine: another one
    of either, and the same engine, is another fingerprint."""
    prints = set()
    for number, (bos, answer) in enumerate([("<s>", "A:"), ("</s>", "A:"), ("<s>", "B:")]):
        tokenizer = read_tokenizer(str(tiny_tokenizer(tmp_path / str(number))))
        tokenizer.bos_token = bos
        tokenizer.chat_template = (
            "{%- for message in messages -%}"
            "{%- if message.role == 'user' -%}Q: {{ message.content }}"
            "{%- else -%}" + answer + "{{ message.content }}<|im_end|>{%- endif -%}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}" + answer + "{%- endif -%}"
        )
        config = replace(_processor(tmp_path / str(number), "chatml").config, template="tokenizer")
        prints.add(Processor(tokenizer, config).fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("view", "image_mode", "pad_colour"),
    [("anyres", "anyres", None), ("crop", "square", None), ("pad", "pad", MEAN_COLOUR)],
)
def test_fingerprint_of_earlier_versions_is_unchanged(
    tmp_path: Path, view: str, image_mode: str, pad_colour: tuple[int, int, int] | None
) -> None:
    """The hashed configuration has the keys and values of earlier versions, so that their length tables and checkpoints
    remain valid."""
    base = _processor(tiny_tokenizer(tmp_path), "chatml")
    config = replace(base.config, views=ViewsConfig(view, view), pad_colour=pad_colour)
    colour = "null" if pad_colour is None else "[122, 116, 104]"
    assert json.dumps(config.fingerprint_values(), sort_keys=True) == (
        '{"grids": [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]], '
        f'"image_mode": "{image_mode}", "max_length": 4096, "pad_colour": {colour}, "patches_per_side": 4, '
        '"rounding": "exact", "template": "chatml", "tile": 28, "unmask_special_tokens": false}'
    )


def test_prompt_ends_before_the_answer(tmp_path: Path) -> None:
    """The ids of a question are the first ids of the question with its answer."""
    for template in sorted(set(TEMPLATES) - {"plain"}):
        processor = _processor(tiny_tokenizer(tmp_path / template), template)
        messages = _rounds("What is it?", "A red circle.")
        ids, images = processor.prompt(messages[:1], [SIZE])
        whole = processor.layout(messages, [SIZE])
        np.testing.assert_array_equal(ids, whole.ids[: len(ids)])
        assert len(ids) == int(np.flatnonzero(whole.labels != IGNORE)[0])
        assert images == whole.images


def test_unsupported_tokenizers_are_errors(tmp_path: Path) -> None:
    """A missing beginning-of-sequence token and an end token of several tokens are errors."""
    without_bos = tiny_tokenizer(tmp_path / "qwen", bos=None)
    with pytest.raises(ModelError, match="vicuna_v1 begins with the beginning-of-sequence token"):
        _processor(without_bos, "vicuna_v1")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.add_tokens(["<", "|", "im", "_", "end", ">", "s", "/"])
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="s").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"end token of template chatml.*must be one token.*stage\.template=NAME"):
        _processor(tmp_path / "bare", "chatml")


@pytest.mark.parametrize("template", ["qwen_1_5", "llava_llama_3"])
def test_unmask_special_tokens(tmp_path: Path, template: str) -> None:
    """The option supervises complete assistant messages and special tokens everywhere; the ids do not change."""
    plain = _processor(tiny_tokenizer(tmp_path / "bytes"), template)
    config = replace(plain.config, unmask_special_tokens=True)
    released = Processor(plain.tokenizer, config)
    messages = [Message("user", "<image>\nWhat?"), Message("assistant", "That."), Message("user", "A\nB")]
    messages.append(Message("assistant", "No."))
    masked, unmasked = plain.layout(messages, [(40, 33)]), released.layout(messages, [(40, 33)])
    np.testing.assert_array_equal(masked.ids, unmasked.ids)
    supervised, more = masked.labels != IGNORE, unmasked.labels != IGNORE
    assert (more | ~supervised).all()  # all supervised positions remain supervised
    specials = [plain.tokenizer.convert_tokens_to_ids(t) for t in plain.template.released_specials if t != "\n"]
    assert more[np.isin(masked.ids, specials)].all()
    assert not supervised[np.isin(masked.ids, specials[:1])].any()
    header = plain.tokenizer(plain.template.header, add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(masked.ids)) if masked.ids[i : i + len(header)].tolist() == header)
    assert more[start : start + len(header)].all()
    assert released.fingerprint != plain.fingerprint


def test_unmask_special_tokens_needs_a_released_model(tmp_path: Path) -> None:
    """No released model with Vicuna's template was supervised on special tokens, so the option is an error."""
    plain = _processor(tiny_tokenizer(tmp_path / "bytes"), "vicuna_v1")
    with pytest.raises(ModelError, match="unmask_special_tokens"):
        Processor(plain.tokenizer, replace(plain.config, unmask_special_tokens=True))
