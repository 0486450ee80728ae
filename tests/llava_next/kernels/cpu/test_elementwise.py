"""Norms, gates and the rotary embedding on a CPU in one pass: what torch computes, and the same bits always."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava_next.config import ElementwiseKernel, ModelError
from llava_next.kernels.cpu import elementwise as cpu_fused
from llava_next.kernels.cpu.elementwise import rms_norm, rotate, swish, takes_fused

WHY_NOT = cpu_fused.unavailable_reason()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

CPU = torch.device("cpu")
HERE = torch.backends.cpu.get_cpu_capability()
KINDS = ["DEFAULT", "AVX2", "AVX512"]

WIDTHS = [1, 4, 7, 16, 17, 96, 384]
"""Whole vectors of 4, 8 and 16 values, and not."""


def numbers(*shape: int) -> torch.Tensor:
    """The same each time, about 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def both(
    ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], given: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of ours in fp32 and of the formula in fp64."""
    results = []
    for function, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
        output = function(*inputs)
        upstream = numbers(*output.shape).detach().to(dtype)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, upstream)])
    return results[0], results[1]


def assert_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """By the norm of the difference, to fp32's rounding."""
    for a, b in zip(found, expected, strict=True):
        assert float((a.double() - b).norm()) <= 1e-6 * max(float(b.norm()), 1.0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_rms_norm(width: int, rows: int) -> None:
    """Beside torch's, on both sides of a block of 64 rows."""
    given = (numbers(1, rows, width), numbers(width))
    assert_close(*both(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (width,), w, 1e-5), given))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4096), (2, 3, 5000)])
@pytest.mark.parametrize("beta", [1.0, 1.702])
def test_swish(shape: tuple[int, ...], beta: float) -> None:
    """Alone and as a gate, beside its formula, on both sides of a block."""
    x, gated = numbers(*shape), numbers(*shape, 1)[..., 0]
    assert_close(*both(lambda x: swish(x, beta=beta), lambda x: x * torch.sigmoid(beta * x), [x]))
    assert_close(
        *both(lambda x, g: swish(x, g, beta=beta), lambda x, g: x * torch.sigmoid(beta * x) * g, [x, gated]),
    )


def test_swish_far_out() -> None:
    """Where e^x is infinite or zero, and at zero of either sign: torch's values, no number that is none."""
    x = torch.tensor([-1e30, -500.0, -104.0, -88.0, -87.0, -20.0, -0.0, 0.0, 20.0, 88.0, 500.0, 1e30])
    (ours, of_x), (theirs, expected) = both(swish, F.silu, [x])
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(of_x.double(), expected, rtol=1e-6, atol=1e-30)


def test_what_is_no_number_is_not_hidden() -> None:
    """It stays in its place, or in its row of a norm."""
    x = torch.zeros(3, 20)
    x[1, 5] = float("nan")
    assert swish(x).isnan().nonzero().tolist() == [[1, 5]]
    assert rms_norm(x, torch.ones(20), 1e-6).isnan().all(dim=-1).tolist() == [False, True, False]


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The formula."""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 6), (6, 64), (2, 128)])
@pytest.mark.parametrize("length", [1, 40, 700])
def test_rotation(heads: int, width: int, length: int) -> None:
    """Beside its formula, also for angles that differ between the halves."""
    cos, sin = numbers(1, length, width).detach(), numbers(1, length, width + 1)[..., 1:].detach()
    x = numbers(1, length, heads, width).transpose(1, 2)
    assert_close(*both(lambda x: rotate(x, cos, sin), lambda x: halves(x, cos.double(), sin.double()), [x]))


def test_strides_do_not_matter() -> None:
    """Views of something else, and a gradient that is one number expanded."""
    x, cos, sin = numbers(1, 3, 20, 8), numbers(1, 8, 20).detach().mT, numbers(1, 20, 8).detach()
    for view in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT, x[:, :, ::2]):
        angles = (cos[:, : view.shape[2]], sin[:, : view.shape[2]])
        torch.testing.assert_close(rotate(view, *angles), rotate(view.contiguous(), *angles), rtol=0, atol=0)
        weight = numbers(8)
        torch.testing.assert_close(
            rms_norm(view, weight, 1e-6), rms_norm(view.contiguous(), weight, 1e-6), rtol=0, atol=0
        )
        torch.testing.assert_close(swish(view, view), swish(view.contiguous(), view.contiguous()), rtol=0, atol=0)
    for output in (rotate(x, cos, sin), rms_norm(x, numbers(8), 1e-6), swish(x, x)):
        (expanded,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        (whole,) = torch.autograd.grad(output, x, torch.ones(output.shape))
        assert torch.equal(expanded, whole)


def test_nothing_is_something() -> None:
    """A rank without a row, a row without a tile: empty outputs, and gradients of zero."""
    x, weight = torch.zeros(1, 0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    swish(x, x).sum().backward()
    rotate(x[:, None], x, x).sum().backward()
    assert x.grad is not None


def test_the_number_of_threads_changes_no_bit() -> None:
    """Blocks are of a fixed size, and sums of blocks are added in order."""
    x, weight = numbers(1, 500, 384), numbers(384)
    heads, angles = numbers(1, 6, 500, 64), numbers(1, 500, 64).detach()

    def results() -> list[torch.Tensor]:
        outputs = (rms_norm(x, weight, 1e-6), swish(x, x), rotate(heads, angles, angles))
        inputs = ((x, weight), (x,), (heads,))
        pairs = zip(outputs, inputs, strict=True)
        return [each for output, given in pairs for each in (output, *torch.autograd.grad(output.sum(), given))]

    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 16):
            torch.set_num_threads(num_threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --------------------------------------------------------------------------------------------------- how it is compiled


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache in which nothing is compiled, and a process that has loaded nothing."""
    monkeypatch.setenv("LLAVA_NEXT_CACHE", str(tmp_path))
    cpu_fused._library.cache_clear()
    yield tmp_path
    cpu_fused._library.cache_clear()


@pytest.mark.parametrize("kind", KINDS[: KINDS.index(HERE) + 1] if HERE in KINDS else ["DEFAULT"])
def test_every_width_of_vectors(fresh: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What this processor runs."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: kind)
    for width in WIDTHS:
        test_rms_norm(width, 65)
    test_swish((3, 7), 1.0)
    test_swish_far_out()
    test_rotation(3, 6, 40)
    assert len(list(fresh.rglob("*.so"))) == 1


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """torch's operations take their place, which is said; who asks for it by name is told why not."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    with caplog.at_level(logging.WARNING):
        assert not takes_fused("auto", CPU, torch.float32)
    (record,) = caplog.records
    assert "elementwise=auto takes torch's own operations, which are slower here" in record.message
    assert "no-such-compiler" in record.message
    with pytest.raises(ModelError, match=r"elementwise=fused: .*no-such-compiler.*; choose elementwise=auto"):
        takes_fused("fused", CPU, torch.float32)


@pytest.mark.parametrize(
    ("kernel", "kind", "dtype", "expected"),
    [
        ("auto", "AVX512", torch.float32, True),
        ("auto", "AVX2", torch.float32, True),
        ("auto", "DEFAULT", torch.float32, False),
        ("auto", "AVX512", torch.bfloat16, False),
        ("auto", "AVX512", torch.float64, False),
        ("torch", "AVX512", torch.float32, False),
        ("fused", HERE, torch.float32, True),
    ],
)
def test_where_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, kernel: ElementwiseKernel, kind: str, dtype: torch.dtype, *, expected: bool
) -> None:
    """By itself in fp32 on processors with wide vectors; named, wherever there is a compiler."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: kind)
    monkeypatch.setattr(cpu_fused, "unavailable_reason", lambda: None)
    assert takes_fused(kernel, CPU, dtype) is expected


def test_what_it_is_not_for_is_refused() -> None:
    """Another device, another precision: the reason and the way out."""
    for device, dtype in ((torch.device("cuda"), torch.float32), (CPU, torch.bfloat16)):
        with pytest.raises(ModelError, match=r"elementwise=fused: it runs fp32 on a CPU, not .*; choose elementwise="):
            takes_fused("fused", device, dtype)
        assert not takes_fused("auto", device, dtype)
