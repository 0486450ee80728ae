"""Variable-length attention on a CPU: what torch computes, for any lengths, at any number of threads."""

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from llava_next.config import PARTS, AttentionKernel, ModelError
from llava_next.inputs.batch import Segments
from llava_next.kernels import attention
from llava_next.kernels.attention import check_kernel, segment_attention, tile_attention
from llava_next.kernels.cpu import compile as native
from llava_next.kernels.cpu import cpu_attention
from llava_next.model.build import build_model
from llava_next.model.parts import set_recompute, set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import learned, mixed, row, worst_difference

WHY_NOT = cpu_attention.unavailable_reason()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

LENGTHS = [(5,), (1, 1, 1), (12, 13, 96), (95, 97, 255), (256, 257), (1, 700, 33)]
"""On both sides of the blocks of 96 queries and 256 keys, and of strips of 12."""


States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random(total: int, heads: int, kv_heads: int, width: int) -> States:
    """Queries, keys and values of a row."""
    q, k, v = (torch.randn(total, number, width).requires_grad_() for number in (heads, kv_heads, kv_heads))
    return q, k, v


class Case:
    """Random states of a row, with each query's keys; `exact` has them in fp64, `plain` in fp32."""

    def __init__(self, lengths: Sequence[int], heads: int = 2, kv_heads: int = 2, width: int = 16) -> None:
        torch.manual_seed(sum(lengths))
        self.lengths = tuple(lengths)
        self.bounds = torch.tensor([0, *accumulate(lengths)])
        self.seen = torch.cat([torch.arange(length) + 1 for length in lengths])
        total = sum(lengths)
        self.plain = random(total, heads, kv_heads, width)
        self.exact = [states.detach().double().requires_grad_() for states in self.plain]
        self.upstream = torch.randn(total, heads, width)

    def ours(self, scale: float | None = None) -> list[torch.Tensor]:
        """Output and gradients."""
        q, k, v = self.plain
        output = cpu_attention.attend(q, k, v, self.bounds, self.bounds, self.seen, scale)
        return [output.detach(), *torch.autograd.grad(output, self.plain, self.upstream)]

    def torchs(self, scale: float | None = None) -> list[torch.Tensor]:
        """The same in fp64, under a mask that is written down query by query."""
        number = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        starts = self.bounds[:-1][number]
        place = torch.arange(len(number))
        mask = (number[:, None] == number[None]) & (place[None] < (starts + self.seen)[:, None])
        q, k, v = (states.transpose(0, 1)[None] for states in self.exact)
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        return [output.detach(), *torch.autograd.grad(output, self.exact, self.upstream.double())]


def assert_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float = 1e-6) -> None:
    """Each tensor by its error's root mean square, beside values of about 1; torch's own in fp32 is up to 3e-7."""
    for a, b in zip(found, expected, strict=True):
        size = b.numel() ** 0.5
        assert float((a.double() - b).norm()) / size < tolerance * max(1.0, float(b.norm()) / size)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 64), (4, 2, 48), (3, 1, 128), (2, 1, 20)])
def test_is_causal_attention(lengths: tuple[int, ...], heads: int, kv_heads: int, width: int) -> None:
    """Output and gradients beside torch's in fp64: grouped heads, heads of any width, segments of any length."""
    case = Case(lengths, heads, kv_heads, width)
    assert_close(case.ours(), case.torchs())


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 2)]),
    st.floats(0.05, 1.0),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_seen(lengths: list[int], heads: tuple[int, int], scale: float, data: st.DataObject) -> None:
    """Any number of keys for each query, as long as it never falls along a segment: causal, whole, or in between."""
    case = Case(lengths, *heads)
    seen = [sorted(data.draw(st.lists(st.integers(1, length), min_size=length, max_size=length))) for length in lengths]
    case.seen = torch.tensor([number for numbers in seen for number in numbers])
    assert_close(case.ours(scale), case.torchs(scale), 5e-6)  # sums of up to 60 gradients that are zero


def test_the_number_of_threads_changes_no_bit() -> None:
    """A task is one head of one segment, whoever takes it."""
    case = Case((130, 7, 301), heads=3, kv_heads=3)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 16):
            torch.set_num_threads(num_threads)
            results.append(case.ours())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_a_neighbour_changes_no_bit() -> None:
    """A segment's output and gradients are the same alone and between others."""
    case = Case((40, 300, 9))
    whole = case.ours()
    q, k, v = (states[40:340].detach().requires_grad_() for states in case.plain)
    case.plain = (q, k, v)
    case.bounds, case.seen, case.upstream = torch.tensor([0, 300]), case.seen[40:340], case.upstream[40:340]
    for alone, among in zip(case.ours(), whole, strict=True):
        assert torch.equal(alone, among[40:340])


def test_strides_do_not_matter() -> None:
    """Heads before positions, values apart from one another, a gradient that is one number expanded."""
    case = Case((30, 111), heads=3, kv_heads=3, width=32)
    expected = case.ours()
    q, k, v = case.plain
    strided = (
        q.transpose(0, 1).contiguous().transpose(0, 1),
        k.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.stack([v, v], dim=-1)[..., 0],
    )
    assert len({states.stride() for states in strided}) == 3
    q, k, v = (states.detach().requires_grad_() for states in strided)
    case.plain = (q, k, v)
    for found, wanted in zip(case.ours(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    case.upstream = torch.ones(()).expand(case.upstream.shape)
    assert_close(case.ours(), case.torchs())


def test_large_scores_stay_finite() -> None:
    """Scores in the thousands, where a softmax that does not subtract the largest is infinite: one key takes all."""
    case = Case((200, 64))
    for states in (*case.plain[:2], *case.exact[:2]):
        states.data *= 60
    ours, torchs = case.ours(), case.torchs()
    assert all(bool(tensor.isfinite().all()) for tensor in ours)
    assert_close(ours[:1], torchs[:1], 1e-4)


def test_what_is_no_number_is_not_hidden() -> None:
    """A key that is none reaches every query that sees it, and nothing else: a step must be stopped by it."""
    case = Case((10, 30))
    with torch.no_grad():
        case.plain[1][17, 0, 3] = float("nan")
    output = case.ours()[0]
    assert output[:17].isfinite().all()
    assert output[17:, 0].isnan().all()
    assert output[:, 1].isfinite().all()


def test_segments_without_queries() -> None:
    """Of the last block only supervised positions ask; a sample without any has zero gradients, not stale memory."""
    case = Case((50, 80))
    picked = torch.tensor([60, 61, 129])
    q, k, v = case.plain
    output = cpu_attention.attend(q[picked], k, v, torch.tensor([0, 0, 3]), case.bounds, case.seen[picked])
    found = [output, *torch.autograd.grad(output, case.plain, case.upstream[picked])]
    whole = case.torchs()
    assert_close([output.detach()], [whole[0][picked]])
    upstream = torch.zeros_like(case.upstream).index_put((picked,), case.upstream[picked])
    case.upstream = upstream
    assert_close(found[1:], case.torchs()[1:])
    for of_key_or_value in found[2:]:
        assert not of_key_or_value[:50].any()


def test_what_does_not_fit_is_refused() -> None:
    """Another type, heads that cannot be shared, indices that do not belong to the tensors: nothing is read."""
    case = Case((5, 6))
    q, k, v = case.plain
    good = (case.bounds, case.bounds, case.seen)
    with pytest.raises(ValueError, match="must be fp32 on a CPU"):
        cpu_attention.attend(q.double(), k, v, *good)
    with pytest.raises(ValueError, match="must be fp32 on a CPU"):
        cpu_attention.attend(q, k, v[:, :, :8], *good)
    with pytest.raises(ValueError, match="2 heads of queries cannot share 3"):
        cpu_attention.attend(q, torch.randn(11, 3, 16), torch.randn(11, 3, 16), *good)
    with pytest.raises(ValueError, match="contiguous int64"):
        cpu_attention.attend(q, k, v, case.bounds.int(), case.bounds, case.seen)
    with pytest.raises(ValueError, match="3 and 2 bounds"):
        cpu_attention.attend(q, k, v, case.bounds, case.bounds[:2], case.seen)
    with pytest.raises(ValueError, match="the last bounds are not the 11 queries and 11 keys"):
        cpu_attention.attend(q, k, v, case.bounds, torch.tensor([0, 5, 12]), case.seen)


# --------------------------------------------------------------------------------------------------- how it is compiled


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache in which nothing is compiled, and a process that has loaded nothing."""
    monkeypatch.setenv("LLAVA_NEXT_CACHE", str(tmp_path))
    caches = (cpu_attention._library, attention._is_compiled)
    for each in caches:
        each.cache_clear()
    yield tmp_path
    for each in caches:
        each.cache_clear()


KINDS = ["DEFAULT", "AVX2", "AVX512"]
HERE = torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize("kind", KINDS[: KINDS.index(HERE) + 1] if HERE in KINDS else ["DEFAULT"])
def test_every_width_of_vectors(fresh: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What this processor runs: other tiles and strips, the same result."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: kind)
    for lengths in LENGTHS[2:]:
        case = Case(lengths, 4, 2, 48)
        assert_close(case.ours(), case.torchs())
    assert len(list(fresh.rglob("*.so"))) == 1


def test_without_openmp_it_starts_threads(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch that brings no OpenMP: the name is one that no library has."""
    case = Case((90, 310), heads=3, kv_heads=3)
    before = case.ours()
    cpu_attention._library.cache_clear()
    monkeypatch.setattr(native, "_OPTIONS", (*native._OPTIONS, "-DGOMP_parallel=llava_next_no_such_function"))
    for a, b in zip(case.ours(), before, strict=True):
        assert torch.equal(a, b)
    assert len(list(fresh.rglob("*.so"))) == 2


def _segments() -> Segments:
    return Segments(torch.tensor([0, 5, 14], dtype=torch.int32), (5, 9))


def test_auto_does_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SDPA takes its place, which is said once; who asks for it by name is told why not."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    q, k, v = (torch.randn(1, 2, 14, 16) for _ in range(3))
    with caplog.at_level(logging.WARNING):
        outputs = [segment_attention(nn.Module(), q, k, v, None, segments=_segments())[0] for _ in range(2)]
    sdpa, _ = segment_attention(nn.Module(), q, k, v, None, segments=_segments(), kernel="sdpa")
    assert torch.equal(outputs[0], sdpa)
    (record,) = caplog.records
    assert "attention=auto takes SDPA, which is slower here" in record.message
    assert "no-such-compiler" in record.message
    with pytest.raises(ModelError, match=r"attention=varlen: .*no-such-compiler.*; choose attention=auto"):
        check_kernel("varlen", torch.device("cpu"), torch.float32)


def test_half_precision_is_refused_by_name() -> None:
    """Before the run, with the way out; `auto` takes SDPA there."""
    with pytest.raises(ModelError, match=r"attention=varlen: it runs fp32 on a CPU, not torch.bfloat16; choose"):
        check_kernel("varlen", torch.device("cpu"), torch.bfloat16)
    check_kernel("auto", torch.device("cpu"), torch.bfloat16)
    check_kernel("varlen", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(("kind", "taken"), [("AVX512", True), ("AVX2", True), ("DEFAULT", False)])
def test_auto_takes_it_where_it_was_measured(monkeypatch: pytest.MonkeyPatch, kind: str, *, taken: bool) -> None:
    """On processors with wide vectors, in fp32."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: kind)
    monkeypatch.setattr(attention, "_is_compiled", lambda: True)
    assert attention._varlen_is_faster(torch.zeros(1)) == taken
    assert not attention._varlen_is_faster(torch.zeros(1, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_attend_as_torchs_do(causal: bool) -> None:
    """Each tile by itself, in fp32 by this package's kernel; a causal tower stays with SDPA."""
    torch.manual_seed(1)
    q, k, v = states = [torch.randn(3, 37, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    module = nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    output, weights = tile_attention(module, q, k, v, None, scaling=0.2)
    assert weights is None
    expected = scaled_dot_product_attention(q, k, v, scale=0.2, is_causal=causal).transpose(1, 2)
    upstream = torch.randn(expected.shape)
    found = torch.autograd.grad(output, states, upstream, retain_graph=True)
    wanted = torch.autograd.grad(expected, states, upstream, retain_graph=True)
    assert_close([output.detach(), *found], [tensor.detach().double() for tensor in (expected, *wanted)])


@pytest.mark.parametrize("recompute", [(), ("vision_tower", "language_model")], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kernel", ["auto", "varlen"])
def test_a_model_learns_the_same(
    make_backbone: MakeBackbone, kernel: AttentionKernel, recompute: tuple[str, ...]
) -> None:
    """Losses and every gradient of rows with pictures, with text alone and with nothing, beside SDPA's."""
    backbone = make_backbone(num_attention_heads=4, num_key_value_heads=2)
    examples = [sample.example for sample in mixed(backbone)]
    results = []
    for name in ("sdpa", kernel):
        model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8, attention=name)
        set_trained_parts(model, PARTS)
        set_recompute(model, recompute)
        results.append(learned(model, [row(backbone, these) for these in (examples, examples[1:2], [])]))
    for (expected, plain), (loss, ours) in zip(*results, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert worst_difference(ours, plain, plain) < 1e-5


def test_a_row_is_not_read_one_by_one(make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for all of a row's samples, and one for all of its tiles, in every block."""
    backbone = make_backbone()
    calls: list[int] = []
    attend = cpu_attention.attend

    def counted(*args: Any) -> torch.Tensor:
        calls.append(len(args[3]) - 1)
        return attend(*args)

    monkeypatch.setattr(cpu_attention, "attend", counted)
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8, attention="varlen")
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    model(batch)
    blocks = {part: len(list(model.get_submodule(name).children())) for part, name in model.blocks.items()}
    assert calls == [len(batch.tiles)] * blocks["vision_tower"] + [6] * blocks["language_model"]
