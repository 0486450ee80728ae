"""Linear layers by oneDNN compute what torch's own do, wherever it is asked for, and keep little memory for it."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from llava_next.config import PARTS, LinearKernel, ModelError
from llava_next.kernels.cpu import onednn as linear
from llava_next.kernels.cpu.onednn import run_by_onednn, takes_onednn
from llava_next.model.build import build_model
from llava_next.model.parts import set_recompute, set_trained_parts
from llava_next.model.speedups import use_onednn
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import learned, mixed, row, worst_difference

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def twins(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A layer of torch's, and the same by oneDNN."""
    torch.manual_seed(5)
    plain = nn.Linear(24, 40, bias=bias)
    ours = deepcopy(plain)
    run_by_onednn(ours)
    return plain, ours


def gradients_of(layer: nn.Linear) -> list[torch.Tensor | None]:
    """Weight's and bias's."""
    return [parameter.grad for parameter in layer.parameters()]


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (1, 130, 24), (3, 17, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    """States of any number of dimensions; a second backward pass adds to the first."""
    plain, ours = twins(bias)
    given = torch.randn(shape)
    grads = []
    for layer in (plain, ours):
        x = given.clone().requires_grad_()
        for _ in range(2):
            (layer(x) ** 3).sum().backward()
        grads.append([x.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    torch.testing.assert_close(ours(given), plain(given), rtol=1e-5, atol=1e-5)
    for found, expected in zip(*reversed(grads), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert type(ours(given).grad_fn).__name__ == "_ProductBackward"


@needs_onednn
def test_strides_do_not_matter() -> None:
    """States that are a view of something else, and a gradient that is one number expanded."""
    plain, ours = twins(bias=True)
    base = torch.randn(24, 9).requires_grad_()
    for layer in (plain, ours):
        layer(base.t()).sum().backward()
    for found, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5)
    ours.zero_grad()
    ours(base.t()[::2]).expand(2, 5, 40).mean().backward()
    (gradient,) = gradients_of(ours)[:1]
    assert gradient is not None
    assert gradient.isfinite().all()


@needs_onednn
def test_only_what_trains_gets_a_gradient() -> None:
    """A frozen layer passes one on; a trained one on inputs without any makes its own."""
    _, ours = twins(bias=True)
    ours.requires_grad_(False)
    x = torch.randn(6, 24, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None
    assert gradients_of(ours) == [None, None]
    ours.requires_grad_(True)
    ours(torch.randn(6, 24)).sum().backward()
    assert None not in gradients_of(ours)


@needs_onednn
@pytest.mark.parametrize("recompute", [(), ("vision_tower", "language_model")])
def test_a_model_learns_the_same(make_backbone: MakeBackbone, recompute: tuple[str, ...]) -> None:
    """Losses and every gradient of rows with pictures, with text alone and with nothing, recompute or not."""
    backbone = make_backbone("clip")
    examples = [sample.example for sample in mixed(backbone)]
    results = []
    for by_onednn in (False, True):
        model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
        set_trained_parts(model, PARTS)
        set_recompute(model, recompute)
        if by_onednn:
            use_onednn(model)
        results.append(learned(model, [row(backbone, these) for these in (examples, examples[1:2], [])]))
    for (expected, plain), (loss, ours) in zip(*results, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert worst_difference(ours, plain, plain) < 1e-4


@needs_onednn
def test_every_linear_layer_is_meant_but_compiled_ones(make_backbone: MakeBackbone) -> None:
    """Of a part that torch.compile translates none is."""
    model = build_model(make_backbone("clip"), dtype=torch.float32, seed=3)
    use_onednn(model, compiled=("language_model",))

    def changed(module: nn.Module) -> set[bool]:
        return {"forward" in vars(layer) for layer in module.modules() if isinstance(layer, nn.Linear)}

    assert changed(model.hf.model.vision_tower) == changed(model.hf.model.multi_modal_projector) == {True}
    assert changed(model.hf.model.language_model) == {False}


@pytest.mark.parametrize(
    ("kernel", "capability", "cpuinfo", "dtype", "expected"),
    [
        ("auto", "AVX512", "vendor_id\t: AuthenticAMD\n", torch.float32, True),
        ("auto", "AVX512", "vendor_id\t: GenuineIntel\n", torch.float32, False),
        ("auto", "AVX2", "vendor_id\t: AuthenticAMD\n", torch.float32, False),
        ("auto", "AVX512", "vendor_id\t: AuthenticAMD\n", torch.bfloat16, False),
        ("auto", "AVX512", "vendor_id\t: AuthenticAMD\n", torch.float64, False),
        ("torch", "AVX512", "vendor_id\t: AuthenticAMD\n", torch.float32, False),
        ("onednn", "AVX2", "vendor_id\t: GenuineIntel\n", torch.float32, True),
    ],
)
def test_it_is_taken_where_mkl_is_slow(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    kernel: LinearKernel,
    capability: str,
    cpuinfo: str,
    dtype: torch.dtype,
    expected: bool,
) -> None:
    """By itself on AMD's processors with AVX-512 alone, and in fp32 alone; named, anywhere."""
    path = tmp_path_factory.mktemp("proc") / "cpuinfo"
    path.write_text(f"processor\t: 0\n{cpuinfo}", encoding="utf-8")
    monkeypatch.setattr(linear, "CPU_FACTS", path)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    assert takes_onednn(kernel, CPU, dtype) is expected


def test_a_machine_that_tells_nothing_of_itself_keeps_torchs_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No file of the processor's facts (it is Linux's), no guess."""
    monkeypatch.setattr(linear, "CPU_FACTS", tmp_path_factory.mktemp("proc") / "cpuinfo")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert not takes_onednn("auto", CPU, torch.float32)


def test_what_it_is_not_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device, another precision, another build of torch: the reason and the way out."""
    for device, dtype in ((torch.device("cuda"), torch.float32), (CPU, torch.bfloat16)):
        with pytest.raises(ModelError, match=r"linear=onednn: it runs fp32 on a CPU, not .*; choose linear=auto"):
            takes_onednn("onednn", device, dtype)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    with pytest.raises(ModelError, match=r"linear=onednn: this torch was built without it; choose linear=auto"):
        takes_onednn("onednn", CPU, torch.float32)


ROWS_OF_ANY_LENGTH = """
import torch
from torch import nn
from llava_next.kernels.cpu.onednn import run_by_onednn

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

layer = nn.Linear(64, 256)
run_by_onednn(layer)
seen = []
for tokens in range(16, 516):
    layer(torch.randn(tokens, 64, requires_grad=True)).sum().backward()
    seen.append(resident_mib())
print(seen[-1] - seen[50])
"""


@needs_onednn
def test_code_for_every_length_is_not_kept() -> None:
    """450 lengths more cost less than what oneDNN would keep by default (600 MiB were measured)."""
    command = [sys.executable, "-c", ROWS_OF_ANY_LENGTH]
    grown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert float(grown) < 75
