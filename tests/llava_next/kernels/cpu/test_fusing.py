"""Modules that run by fused kernels learn what they did before, and only those that compute the same run by them."""

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llava_next.config import PARTS, LoraConfig
from llava_next.kernels.cpu import elementwise as cpu_fused
from llava_next.kernels.cpu import fusing
from llava_next.kernels.cpu.fusing import fuse
from llava_next.model.build import build_model
from llava_next.model.lora import add_adapters
from llava_next.model.parts import set_recompute, set_trained_parts
from llava_next.model.speedups import use_fused
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import learned, mixed, row, worst_difference

WHY_NOT = cpu_fused.unavailable_reason()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def fused_modules(model: nn.Module) -> Counter[str]:
    """How many modules of each class have another forward than their class."""
    return Counter(type(module).__name__ for module in model.modules() if "forward" in vars(module))


@pytest.mark.parametrize("recompute", [(), ("vision_tower", "language_model")], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
def test_a_model_learns_the_same(make_backbone: MakeBackbone, recompute: tuple[str, ...], adapted: bool) -> None:
    """Losses and every gradient of rows with pictures, with text alone and with nothing, recompute or not."""
    if adapted:
        pytest.importorskip("peft")
    backbone = make_backbone("clip")
    examples = [sample.example for sample in mixed(backbone)]
    results = []
    for by_kernels in (False, True):
        model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
        if adapted:
            add_adapters(model, {"language_model": LoraConfig(2, 4.0, ("q_proj", "gate_proj", "down_proj"))}, seed=0)
        set_trained_parts(model, PARTS)
        set_recompute(model, recompute)
        if by_kernels:
            use_fused(model)
            tower, layers = len(model.hf.model.vision_tower.encoder.layers), 2
            assert fused_modules(model) == {
                "LlamaRMSNorm": 2 * layers + 1,
                "LlamaMLP": layers,
                "LlamaAttention": layers,
                "QuickGELUActivation": tower,
            }
        results.append(learned(model, [row(backbone, these) for these in (examples, examples[1:2], [])]))
    for (expected, plain), (loss, ours) in zip(*results, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert worst_difference(ours, plain, plain) < 1e-5


ARCHITECTURES = {
    "llama": {"RMSNorm", "MLP", "Attention"},
    "mistral": {"RMSNorm", "MLP", "Attention"},
    "qwen2": {"RMSNorm", "MLP", "Attention"},
    "qwen3": {"RMSNorm", "MLP", "Attention"},
    "gemma": {"Attention"},  # its norm adds one to the weight, its gate is GELU
    "gemma2": {"Attention"},
    "phi3": {"RMSNorm", "Attention"},  # one projection for gate and states
    "phi3, a part of each head": {"RMSNorm", "Attention"},
    "granite": {"RMSNorm", "MLP", "Attention"},
    "olmo2": {"RMSNorm", "MLP", "Attention"},
    "starcoder2": {"Attention"},  # layer norms and no gate
    "cohere": {"MLP"},  # it turns neighbours, not halves
    "gpt_neox": {"Attention"},  # layer norms, no gate; a part of each head is turned
}
"""What of a decoder's blocks runs by kernels; the rest is left alone."""


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_architectures(case: str) -> None:
    """Whatever a decoder is made of, its logits and gradients stay the same; modules that are known are changed."""
    model_type, _, in_part = case.partition(", ")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **sizes, **heads, **special)
    if in_part:
        config.rope_parameters["partial_rotary_factor"] = 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():  # norms that start at one or zero would look alike
            parameter.add_(0.1 * torch.randn(parameter.shape))
    ids = torch.randint(3, 50, (1, 20))

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    logits, gradients = run()
    for module in model.modules():
        fuse(module)
    kinds = {name for name in fused_modules(model) if not name.endswith("Activation")}
    assert {end for end in ("RMSNorm", "MLP", "Attention") if any(name.endswith(end) for name in kinds)} == (
        ARCHITECTURES[case]
    )
    ours, changed = run()
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    for found, expected in zip(changed, gradients, strict=True):
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-7


def test_compiled_parts_are_left_alone(make_backbone: MakeBackbone) -> None:
    """Blocks that torch.compile translates keep their own code; what stands around them need not."""
    model = build_model(make_backbone("clip"), dtype=torch.float32, seed=3)
    use_fused(model, compiled=("language_model", "vision_tower"))
    assert fused_modules(model) == {"LlamaRMSNorm": 1}
    use_fused(model, compiled=("language_model",))
    assert set(fused_modules(model)) == {"LlamaRMSNorm", "QuickGELUActivation"}


def test_what_only_looks_alike_is_left_alone() -> None:
    """Names and attributes are no proof: a norm over another mean, a gate of another activation, code that fails."""

    class HalfRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)

    class BrokenNorm(HalfRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("only on a GPU")

    class Gated(nn.Module):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.act_fn = activation
            self.gate_proj = self.up_proj = self.down_proj = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    for module in (HalfRMSNorm(), BrokenNorm(), Gated(nn.GELU())):
        fuse(module)
        assert "forward" not in vars(module)
    gated = Gated(nn.SiLU())
    fuse(gated)
    assert "forward" in vars(gated)


def test_the_process_is_left_alone() -> None:
    """The rotation of one model's attention is its own: another model of the architecture keeps transformers'."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4)
    one, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    for module in one.modules():
        fuse(module)
    assert not fused_modules(other)
    attention = type(other.model.layers[0].self_attn)
    rotation = attention.forward.__globals__[fusing._ROTATES]
    assert rotation is getattr(importlib.import_module(attention.__module__), fusing._ROTATES)
    assert rotation.__module__ == attention.__module__
