"""Messages and sizes become ids, labels and counts; the same layout with and without pixels."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from data_recipes.schema.sample import Message
from llava_next.config import AUTHORS_GRIDS, ImageMode, ModelError, ProcessorConfig
from llava_next.inputs.anyres import image_layout
from llava_next.inputs.conversation import TEMPLATES, Segment
from llava_next.inputs.processor import IGNORE, Processor, RejectReason, SampleLayout, SampleRejected
from llava_next.model.build import read_tokenizer
from tests.tiny import PATCHES_PER_SIDE, SIZES_HW, TILE, TokenizerName, encoded_picture, tiny_tokenizer

SIZE = (45, 61)
NUM_IMAGE_TOKENS = image_layout(
    SIZE, mode="anyres", grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=PATCHES_PER_SIDE
).num_tokens


def _processor(
    tokenizer_path: Path, template: str, max_length: int = 4096, image_mode: ImageMode = "anyres"
) -> Processor:
    config = ProcessorConfig(
        template=template,
        image_mode=image_mode,
        grids=AUTHORS_GRIDS,
        tile=TILE,
        patches_per_side=PATCHES_PER_SIDE,
        max_length=max_length,
    )
    return Processor(read_tokenizer(str(tokenizer_path)), config)


def _rounds(*turns: str, picture: bool = True) -> list[Message]:
    messages = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(turns)]
    if picture:
        messages[0] = Message("user", "<image>\n" + messages[0].text)
    return messages


# Answers that open with a letter, a digit, a quote, another script, an emoji, a space of their own, a line break.
ANSWERS = ["A red circle.", "42", '"Quoted," he said.', "你好，世界", "🙂 fine", "line one\nline two", "é"]


def _supervised_runs(layout: SampleLayout) -> list[list[int]]:
    """The ids of each unbroken run of supervised positions."""
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
    if template.caption_only:  # captions follow one another with nothing between
        assert len(runs) == 1
        assert processor.tokenizer.decode(runs[0]).strip() == "\n".join(answers).strip()
        return
    decoded = [processor.tokenizer.decode(run) for run in runs]
    expected = [template.answer_format.replace("{text}", answer) + template.end for answer in answers]
    # A sentencepiece decoder drops the space at the very beginning of what it decodes.
    assert [text.removeprefix(" ") for text in decoded] == [text.removeprefix(" ") for text in expected]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_text_is_the_answers_and_their_ends(tmp_path: Path, template: str, kind: TokenizerName) -> None:
    """Each supervised run decodes to one answer with its end token; nothing of a question or a header is in it."""
    _check_supervision(_processor(tiny_tokenizer(tmp_path / kind, kind), template), ANSWERS)


@pytest.mark.parametrize("template", ["chatml", "qwen_1_5", "chatml_direct"])
def test_supervised_text_with_a_real_tokenizer(smollm2_tokenizer: Path, template: str) -> None:
    """The same with SmolLM2's tokenizer, whose merges are those of real text."""
    _check_supervision(_processor(smollm2_tokenizer, template), ANSWERS)


def test_labels_do_not_depend_on_a_post_processor(tmp_path: Path) -> None:
    """A byte-level one may report tokens without their white space; those tokens are supervised all the same."""
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
def test_ids_are_the_whole_text_with_image_tokens_in_place(tmp_path: Path, template: str, kind: TokenizerName) -> None:
    """Tokenizing the rendered text in one go, each placeholder one token, and then widening it, gives our ids."""
    processor = _processor(tiny_tokenizer(tmp_path / kind, kind), template)
    messages = _rounds("What is it?", "A red circle.", "And now?", "Blue.")
    text = "".join(segment.text for segment in processor.template.render(messages))
    whole = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = [processor.tokenizer.bos_token_id] if processor.template.bos else []
    for token in whole:
        expected += [token] * (NUM_IMAGE_TOKENS if token == processor.image_token_id else 1)
    assert processor.layout(messages, [SIZE]).ids.tolist() == expected


@pytest.mark.parametrize("supervised", [False, True])
def test_a_token_across_a_border_belongs_to_its_last_character(tmp_path: Path, supervised: bool) -> None:
    """The piece "▁ASSISTANT:" begins with the space of the segment before: it counts where its letters stand."""
    processor = _processor(tiny_tokenizer(tmp_path, "metaspace"), "chatml")
    segments = [Segment("Hi, ", not supervised), Segment("ASSISTANT:", supervised)]
    ids, labels, _ = processor._tokens(segments, [])
    assert processor.tokenizer.convert_ids_to_tokens(int(ids[-1])) == "▁ASSISTANT:"
    assert (labels[-1] != IGNORE) == supervised
    assert ((labels[:-1] == IGNORE) == supervised).all()


def test_plain_supervises_the_caption_and_its_line_break(tmp_path: Path) -> None:
    """Stage 1: bos and picture masked, caption and final line break supervised, no end token."""
    processor = _processor(tiny_tokenizer(tmp_path), "plain")
    layout = processor.layout(_rounds("Describe it.", "A red circle."), [SIZE])
    assert layout.ids[0] == processor.tokenizer.bos_token_id
    assert (layout.ids[1 : 1 + NUM_IMAGE_TOKENS] == processor.image_token_id).all()
    assert (layout.labels[: 1 + NUM_IMAGE_TOKENS] == IGNORE).all()
    rest = layout.ids[1 + NUM_IMAGE_TOKENS :]
    np.testing.assert_array_equal(layout.labels[1 + NUM_IMAGE_TOKENS :], rest)
    assert processor.tokenizer.decode(rest) == "A red circle.\n"


def test_captions_serve_a_tokenizer_without_bos(tmp_path: Path) -> None:
    """Stage 1 of Qwen, whose tokenizer has no beginning-of-sequence token: the picture comes first, as in the authors'
    code, where that token is the tokenizer's affair."""
    processor = _processor(tiny_tokenizer(tmp_path, bos=None), "plain")
    layout = processor.layout(_rounds("Describe it.", "A red circle."), [SIZE])
    assert (layout.ids[:NUM_IMAGE_TOKENS] == processor.image_token_id).all()
    assert processor.tokenizer.decode(layout.ids[NUM_IMAGE_TOKENS:]) == "A red circle.\n"
    assert layout.num_supervised == len(layout.ids) - NUM_IMAGE_TOKENS
    text_only = processor.layout([Message("user", "Say it."), Message("assistant", "A red circle.")], [])
    assert text_only.num_supervised == len(text_only.ids) - 1  # nothing predicts the first token


def test_every_template_but_captions_stops(tmp_path: Path) -> None:
    """No template ends its answers without an end token, which supervision teaches and generation stops at."""
    assert {name for name, template in TEMPLATES.items() if not template.end} == {"plain"}
    for name in sorted(set(TEMPLATES) - {"plain"}):
        processor = _processor(tiny_tokenizer(tmp_path / name), name)
        layout = processor.layout(_rounds("What?", "That."), [SIZE])
        assert processor.tokenizer.decode(layout.labels[layout.labels != IGNORE][-1]) == TEMPLATES[name].end


def test_mistral_supervises_the_space_before_the_end(tmp_path: Path) -> None:
    """The token(s) between the answer's last word and </s> are supervised."""
    processor = _processor(tiny_tokenizer(tmp_path), "mistral_instruct")
    layout = processor.layout(_rounds("What?", "Blue."), [SIZE])
    assert processor.tokenizer.decode(layout.labels[layout.labels != IGNORE]) == " Blue. </s>"


@pytest.mark.parametrize("image_mode", ["anyres", "square", "squash"])
def test_counts_without_pixels_are_the_counts_with_pixels(tmp_path: Path, image_mode: ImageMode) -> None:
    """`encode` is `layout` plus tiles: same ids, labels and counts; as many tiles as counted, of every grid."""
    processor = _processor(tiny_tokenizer(tmp_path), "chatml", image_mode=image_mode)
    for number, size in enumerate(SIZES_HW):
        other = SIZES_HW[number - 1]
        messages = _rounds("Compare <image> with it.", "They differ.", "Sure?", "Yes.")
        pictures = [encoded_picture(number, size), encoded_picture(number + 50, other)]
        layout = processor.layout(messages, [size, other])
        example = processor.encode(messages, [size, other], pictures)
        np.testing.assert_array_equal(example.layout.ids, layout.ids)
        np.testing.assert_array_equal(example.layout.labels, layout.labels)
        assert example.tiles.shape == (layout.num_tiles, TILE, TILE, 3)
        num_image_tokens = int((layout.ids == layout.image_token_id).sum())
        assert num_image_tokens == sum(image.num_tokens for image in layout.images)
        assert layout.num_tokens == len(layout.ids) == len(layout.labels)


def test_text_only_samples_have_no_tiles(tmp_path: Path) -> None:
    """No picture: zero tiles of the tower's side, no image token."""
    example = _processor(tiny_tokenizer(tmp_path), "chatml").encode(_rounds("Hi", "Ho", picture=False), [], [])
    assert example.tiles.shape == (0, TILE, TILE, 3)
    assert example.layout.images == ()
    assert not (example.layout.ids == example.layout.image_token_id).any()


def test_a_long_sample_is_cut_after_the_last_answer_that_fits(tmp_path: Path) -> None:
    """For every maximum length: a prefix of the whole that ends with an end token; lost rounds are counted."""
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


def test_pictures_of_lost_rounds_are_lost_with_them(tmp_path: Path) -> None:
    """A cut in front of the second picture keeps the first picture's layout and tiles only."""
    path = tiny_tokenizer(tmp_path)
    messages = _rounds("One?", "First.", "<image>\nTwo?", "Second.")
    sizes, pictures = [SIZE, (56, 56)], [encoded_picture(0, SIZE), encoded_picture(1, (56, 56))]
    whole = _processor(path, "chatml").encode(messages, sizes, pictures)
    assert len(whole.layout.images) == 2
    cut = _processor(path, "chatml", whole.layout.num_tokens - 10).encode(messages, sizes, pictures)
    assert cut.layout.images == whole.layout.images[:1]
    assert cut.layout.num_rounds_cut == 1
    np.testing.assert_array_equal(cut.tiles, whole.tiles[: len(cut.tiles)])
    assert len(cut.tiles) == cut.layout.num_tiles


def test_a_sample_whose_first_answer_does_not_fit_is_rejected(tmp_path: Path) -> None:
    """Too long is a reason with both numbers, not a sample without an answer."""
    path = tiny_tokenizer(tmp_path)
    messages = _rounds("Q?", "A.")
    length = _processor(path, "chatml").layout(messages, [SIZE]).num_tokens
    with pytest.raises(SampleRejected, match=f"{length} tokens.*{length - 2}") as caught:
        _processor(path, "chatml", length - 2).layout(messages, [SIZE])
    assert caught.value.reason is RejectReason.TOO_LONG


def test_a_sample_without_an_answer_is_rejected(tmp_path: Path) -> None:
    """Nothing to learn from: rejected with a reason, never a row without a target."""
    with pytest.raises(SampleRejected) as caught:
        _processor(tiny_tokenizer(tmp_path), "chatml").layout(_rounds("Q?"), [SIZE])
    assert caught.value.reason is RejectReason.NO_SUPERVISED


@pytest.mark.parametrize("num_sizes", [0, 2])
def test_placeholders_and_pictures_must_agree(tmp_path: Path, num_sizes: int) -> None:
    """One placeholder with none or two pictures is an error with both numbers."""
    with pytest.raises(ModelError, match=f"1 placeholders .* {num_sizes} pictures"):
        _processor(tiny_tokenizer(tmp_path), "chatml").layout(_rounds("Q?", "A."), [SIZE] * num_sizes)


def test_fingerprint_follows_all_that_decides_an_encoding(tmp_path: Path) -> None:
    """Another maximum length, template, mode, grid, tile or tokenizer: another fingerprint. The same: the same."""
    path = tiny_tokenizer(tmp_path / "a")
    base = _processor(path, "chatml")
    tokenizer = base.tokenizer
    changed = [
        Processor(tokenizer, replace(base.config, **change))
        for change in (
            {"max_length": 4095},
            {"template": "qwen_1_5"},
            {"image_mode": "square"},
            {"image_mode": "squash"},
            {"grids": AUTHORS_GRIDS[::-1]},
            {"tile": 42},
            {"patches_per_side": 2},
        )
    ]
    changed.append(_processor(tiny_tokenizer(tmp_path / "b", "metaspace"), "chatml"))
    fingerprints = [processor.fingerprint for processor in (base, *changed)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert _processor(path, "chatml").fingerprint == base.fingerprint


@pytest.mark.parametrize(("image_mode", "pad_colour"), [("anyres", None), ("square", None), ("pad", (122, 116, 104))])
def test_the_fingerprint_of_earlier_versions_is_kept(
    tmp_path: Path, image_mode: ImageMode, pad_colour: tuple[int, int, int] | None
) -> None:
    """What is hashed of a configuration has the same keys and values as before there was another image mode, so that a
    length table and a checkpoint of then still fit."""
    base = _processor(tiny_tokenizer(tmp_path), "chatml")
    processor = Processor(base.tokenizer, replace(base.config, image_mode=image_mode, pad_colour=pad_colour))
    colour = "null" if pad_colour is None else "[122, 116, 104]"
    assert json.dumps(asdict(processor.config), sort_keys=True) == (
        '{"grids": [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]], '
        f'"image_mode": "{image_mode}", "max_length": 4096, "pad_colour": {colour}, "patches_per_side": 4, '
        '"rounding": "exact", "template": "chatml", "tile": 28, "unmask_special_tokens": false}'
    )


def test_a_prompt_ends_where_the_answer_begins(tmp_path: Path) -> None:
    """The ids of a question are the first ids of the same question with its answer."""
    for template in sorted(set(TEMPLATES) - {"plain"}):
        processor = _processor(tiny_tokenizer(tmp_path / template), template)
        messages = _rounds("What is it?", "A red circle.")
        ids, images = processor.prompt(messages[:1], [SIZE])
        whole = processor.layout(messages, [SIZE])
        np.testing.assert_array_equal(ids, whole.ids[: len(ids)])
        assert len(ids) == int(np.flatnonzero(whole.labels != IGNORE)[0])
        assert images == whole.images


def test_tokenizers_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    """No bos for a template that opens with one; an end token that is several tokens; each by name."""
    without_bos = tiny_tokenizer(tmp_path / "qwen", bos=None)
    with pytest.raises(ModelError, match="vicuna_v1 opens with the beginning-of-sequence token"):
        _processor(without_bos, "vicuna_v1")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.add_tokens(["<", "|", "im", "_", "end", ">", "s", "/"])
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="s").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"end token of template chatml.*must be one.*stage\.template=NAME"):
        _processor(tmp_path / "bare", "chatml")


@pytest.mark.parametrize("template", ["qwen_1_5", "llava_llama_3"])
def test_special_tokens_are_unmasked_only_on_request(tmp_path: Path, template: str) -> None:
    """The releases' option adds whole assistant messages and special tokens everywhere; ids stay the same."""
    plain = _processor(tiny_tokenizer(tmp_path / "bytes"), template)
    config = replace(plain.config, unmask_special_tokens=True)
    released = Processor(plain.tokenizer, config)
    messages = [Message("user", "<image>\nWhat?"), Message("assistant", "That."), Message("user", "A\nB")]
    messages.append(Message("assistant", "No."))
    ours, theirs = plain.layout(messages, [(40, 33)]), released.layout(messages, [(40, 33)])
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    supervised, more = ours.labels != IGNORE, theirs.labels != IGNORE
    assert (more | ~supervised).all()  # nothing that was supervised is lost
    specials = [plain.tokenizer.convert_tokens_to_ids(t) for t in plain.template.released_specials if t != "\n"]
    assert more[np.isin(ours.ids, specials)].all()
    assert not supervised[np.isin(ours.ids, specials[:1])].any()
    header = plain.tokenizer(plain.template.header, add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(ours.ids)) if ours.ids[i : i + len(header)].tolist() == header)
    assert more[start : start + len(header)].all()
    assert released.fingerprint != plain.fingerprint


def test_templates_without_such_a_release_refuse_the_option(tmp_path: Path) -> None:
    """Vicuna's answers were supervised alone, so the option names nothing there."""
    plain = _processor(tiny_tokenizer(tmp_path / "bytes"), "vicuna_v1")
    with pytest.raises(ModelError, match="unmask_special_tokens"):
        Processor(plain.tokenizer, replace(plain.config, unmask_special_tokens=True))
