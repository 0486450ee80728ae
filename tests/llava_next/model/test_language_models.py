"""Language models: losses in packed rows equal those of single samples for every supported architecture; other models
and configs are errors whose advice works."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BambaConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    XGLMConfig,
)

from llava_next.config import ANYRES, ModelConfig, ModelError
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.language_models import (
    SUPPORTED_MODEL_TYPES,
    attention_windows,
    check_language_model_supported,
    check_positions,
)
from llava_next.model.parts import live_parameters
from tests.llava_next.models import encoded, mixed, row, stock_inputs, stock_twin, worst_difference
from tests.tiny import MAX_POSITIONS, WIDTH, tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 520,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # so that attention is not uniform and a wrong position or segment changes the loss
}
CHANGES: dict[str, dict[str, Any]] = {
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "granite": {"logits_scaling": 1.0},
    "ministral": {"sliding_window": MAX_POSITIONS},
    "mistral": {"sliding_window": None},
    "exaone4": {"sliding_window": MAX_POSITIONS, "sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window": MAX_POSITIONS, "sliding_window_pattern": 2},
    "olmo3": {"sliding_window": MAX_POSITIONS, "layer_types": ["sliding_attention", "full_attention"]},
}
SHORT, LONG = [1.0] * 4, [64.0] * 4


def _config(folder: Path, kind: str, **changes: Any) -> ModelConfig:
    """A tiny model with a language model of this model_type."""
    config = tiny_model(folder)
    AutoConfig.for_model(kind, **{**SIZES, **CHANGES.get(kind, {}), **changes}).save_pretrained(
        config.language_model.path
    )
    return config


def _with_overrides(config: ModelConfig, **overrides: Any) -> ModelConfig:
    return replace(config, language_model=replace(config.language_model, overrides=overrides))


@pytest.mark.parametrize("kind", SUPPORTED_MODEL_TYPES)
def test_packed_loss_equals_single_sample_loss(tmp_path: Path, kind: str) -> None:
    """Each sample's loss in a row of six equals its loss alone (1e-6 relative in fp32) and that of stock
    transformers."""
    backbone = read_backbone(_config(tmp_path, kind))
    assert backbone.hf_config.text_config.model_type == kind
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
    check_positions(model.hf.model.language_model, MAX_POSITIONS)
    samples = mixed(backbone)
    with torch.no_grad():
        alone = torch.cat([model(row(backbone, [sample.example]))[1][:1] for sample in samples])
        packed = model(row(backbone, [sample.example for sample in samples]))[1][: len(samples)]
        assert len(set(alone.tolist())) == len(samples)
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
        stock = stock_twin(model, backbone).eval()
        loss = stock(**stock_inputs(backbone, samples[0])).loss * samples[0].example.layout.num_supervised
    torch.testing.assert_close(alone[0], loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (Gemma2Config(sliding_window=8192), "softcapping"),
        (GptOssConfig(sliding_window=131072), "sinks"),
        (Llama4TextConfig(), "chunked_attention layers"),
        (Qwen3NextConfig(), "linear_attention layers"),
        (BambaConfig(), "linear_attention layers"),
        (CohereConfig(), r"logit_scale=0\.0625"),
        (GraniteConfig(logits_scaling=8.0), r"logits_scaling=8\.0"),
        (MixtralConfig(), r"mixture of experts \(num_local_experts=8"),
        (Qwen3MoeConfig(), "mixture of experts"),
        (XGLMConfig(), "xglm is not supported"),
        (GemmaConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (Olmo3Config(sliding_window=None), "sliding_attention layers"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_unsupported_features_are_errors(config: PretrainedConfig, word: str) -> None:
    """Softcapping, sinks, recurrent states and scaled logits are errors that name the feature."""
    with pytest.raises(ModelError, match=word):
        check_language_model_supported(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        Qwen2Config(use_sliding_window=False),
        Qwen3Config(),
        GraniteConfig(logits_scaling=1.0),
        LlamaConfig(num_experts=0, num_local_experts=None, n_routed_experts=1),
        MistralConfig(sliding_window=32768, max_position_embeddings=32768),
        MistralConfig(sliding_window=4096),
        Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0),
        Gemma3TextConfig(),
        Olmo3Config(max_position_embeddings=8192),
    ],
    ids=lambda config: str(config.model_type),
)
def test_full_attention_and_windows_are_supported(config: PretrainedConfig) -> None:
    """The published backbones are supported."""
    check_language_model_supported(config)


def _phi3_long(folder: Path, original: int) -> Backbone:
    """A Phi-3 with LongRoPE, trained on `original` positions and extended to 4096."""
    rope = {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    }  # fmt: skip
    return read_backbone(_config(folder, "phi3", rope_parameters=rope, original_max_position_embeddings=original))


def test_row_dependent_positions_are_an_error(tmp_path: Path) -> None:
    """LongRoPE changes a short sample's loss in a row with a sample longer than its original positions. The message has
    the largest supported length, at which losses are equal."""
    backbone = _phi3_long(tmp_path, 64)
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
    short, long = encoded(backbone, []).example, encoded(backbone, [], rounds=3).example
    assert short.layout.num_tokens <= 64 < long.layout.num_tokens
    with torch.no_grad():
        alone = float(model(row(backbone, [short]))[1][0])
        beside = float(model(row(backbone, [short, long]))[1][0])
    assert abs(beside - alone) > 1e-3 * alone  # the difference that the error prevents
    with pytest.raises(ModelError, match=r"stage\.max_length=2048") as error:
        check_positions(model.hf.model.language_model, 2048)
    match = re.search(r"stage\.max_length to at most (\d+)", str(error.value))
    assert match is not None
    assert match[1] == "64"
    check_positions(model.hf.model.language_model, 64)
    with torch.no_grad():
        assert float(model(row(backbone, [short, short]))[1][0]) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_dynamic_ntk_is_an_error_beyond_its_positions(tmp_path: Path, kind: str) -> None:
    """Dynamic NTK is supported up to the positions of the config, with one or several layer types."""
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    if kind == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    backbone = read_backbone(_config(tmp_path, kind, rope_parameters=rope, max_position_embeddings=256,
                                     **({"sliding_window": 256} if kind == "gemma3_text" else {})))  # fmt: skip
    decoder = build_model(backbone, dtype=torch.float32, seed=3).hf.model.language_model
    check_positions(decoder, 256)
    with pytest.raises(ModelError, match="at most 256"):
        check_positions(decoder, 300)


WINDOWED: dict[str, dict[str, Any]] = {
    "exaone4": {},
    "gemma3_text": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "olmo3": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0},
    "smollm3": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
}
"""Supported architectures that may have a sliding window, with what else turns it on."""


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows(tmp_path: Path, kind: str) -> None:
    """With a window of 16 tokens, shorter than the samples, packed losses equal those of single samples and of stock
    transformers, and the gradients too; without the window the loss differs. An export has the window."""
    config = _config(tmp_path, kind, sliding_window=16, **WINDOWED[kind])
    backbone = read_backbone(config)
    assert set(attention_windows(backbone.hf_config.text_config)) <= {16, None}
    assert 16 in attention_windows(backbone.hf_config.text_config)
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
    samples = mixed(backbone)
    assert min(sample.example.layout.num_tokens for sample in samples) > 16
    with torch.no_grad():
        alone = torch.cat([model(row(backbone, [sample.example]))[1][:1] for sample in samples])
        packed = model(row(backbone, [sample.example for sample in samples]))[1][: len(samples)]
    torch.testing.assert_close(packed, alone, rtol=2e-6, atol=0)
    stock = stock_twin(model, backbone).eval()
    total = torch.zeros(())
    for sample, expected in zip(samples, alone, strict=True):
        loss = stock(**stock_inputs(backbone, sample)).loss * sample.example.layout.num_supervised
        torch.testing.assert_close(loss, expected, rtol=5e-6, atol=0)
        total = total + loss
    total.backward()
    model(row(backbone, [sample.example for sample in samples]))[0].backward()
    theirs = {f"hf.{name}": parameter.grad for name, parameter in stock.named_parameters()}
    ours = {name: parameter.grad for name, parameter in live_parameters(model)}
    assert worst_difference(ours, theirs, ours) <= 1e-5
    full = read_backbone(_with_overrides(config, sliding_window=MAX_POSITIONS))
    unlimited = build_model(full, dtype=torch.float32, seed=3, num_sources=8)
    with torch.no_grad():
        other = torch.cat([unlimited(row(full, [sample.example]))[1][:1] for sample in samples])
    assert float((other / alone - 1).abs().min()) > 1e-4
    write_hf(model, backbone, backbone.processor(template=None, views=ANYRES, max_length=4096), tmp_path / "out")
    exported = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert attention_windows(exported.config.text_config) == attention_windows(backbone.hf_config.text_config)


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo3", "exaone4"])
def test_advice_about_missing_windows(tmp_path: Path, kind: str) -> None:
    """Sliding layers without a window are an error; with the override of the message the model can be built."""
    config = _with_overrides(_config(tmp_path, kind, sliding_window=16), sliding_window=None)
    with pytest.raises(ModelError, match="sliding") as error:
        read_backbone(config)
    advice = re.search(r"set sliding_window in model\.language_model\.overrides .* to (\d+)", str(error.value))
    assert advice is not None
    read_backbone(_with_overrides(config, sliding_window=int(advice[1])))


ROPE_2024 = [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}, 10000.0),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}, 10000.0),
    ({"rope_scaling": None}, {"rope_type": "default"}, 10000.0),
    ({"rope_theta": 500.0}, {"rope_type": "default"}, 500.0),
    ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear"}, 500.0),
]


@pytest.mark.parametrize(("overrides", "expected", "theta"), ROPE_2024)
def test_rope_keys_of_transformers_4(
    tmp_path: Path, overrides: dict[str, Any], expected: dict[str, Any], theta: float
) -> None:
    """`rope_scaling` with `type` or `rope_type`, and `rope_theta`, are equivalent to `rope_parameters`, in overrides
    and in config.json."""
    config = _config(tmp_path, "llama")
    path = Path(config.language_model.path) / "config.json"
    written = json.loads(path.read_text())
    del written["rope_parameters"]
    then = replace(config, language_model=replace(config.language_model, path=str(tmp_path / "then"),
                   tokenizer=config.language_model.path))  # fmt: skip
    (tmp_path / "then").mkdir()
    (tmp_path / "then" / "config.json").write_text(json.dumps({**written, "rope_theta": 10000.0, **overrides}))
    today = {"rope_theta": theta, **expected, **({"factor": 2.0} if expected["rope_type"] == "linear" else {})}
    models = []
    for each in (_with_overrides(config, **overrides), _with_overrides(config, rope_parameters=today), then):
        backbone = read_backbone(each)
        models.append(build_model(backbone, dtype=torch.float32, seed=3).hf.model.language_model)
    assert torch.equal(models[0].rotary_emb.inv_freq, models[1].rotary_emb.inv_freq)
    assert torch.equal(models[0].rotary_emb.inv_freq, models[2].rotary_emb.inv_freq)
    first = models[0].rotary_emb.inv_freq[-1] * theta ** (1 - 2 / 8)
    assert float(first) == pytest.approx(0.5 if expected["rope_type"] == "linear" else 1.0)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"rope_scaling": {"type": "banana", "factor": 2.0}}, "rope_type=banana"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "got 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "factor"),
    ],
)
def test_invalid_rotary_parameters_are_errors(tmp_path: Path, overrides: dict[str, Any], word: str) -> None:
    """An unknown type and a missing key are errors of one sentence."""
    with pytest.raises(ModelError, match=word):
        read_backbone(_with_overrides(_config(tmp_path, "llama"), **overrides))
