"""The chunked loss against PyTorch's own, its gradients, its memory and its refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.linear_cross_entropy import linear_cross_entropy
from resnet_bk.ops.linear_cross_entropy.chunked import default_chunk_tokens, linear_cross_entropy_op

IGNORE = -100


def make(tokens=37, channels=8, vocabulary=29, *, ignored=9, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, channels, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.randperm(tokens, generator=generator)[:ignored]] = IGNORE
    hidden, weight = (part.to(device, dtype).requires_grad_() for part in (hidden, weight))
    return hidden, weight, targets.to(device)


def plain(hidden, weight, targets, **options):
    return F.cross_entropy(F.linear(hidden, weight), targets, **options)


def loss_and_gradients(function, hidden, weight, targets, **options):
    loss = function(hidden, weight, targets, **options)
    cotangent = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    return loss, *torch.autograd.grad(loss, (hidden, weight), cotangent)


def worst_difference(ours, theirs):
    """Largest difference over the largest magnitude, over loss and gradients."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 28, 1000, None])
def test_matches_cross_entropy(reduction, backend, chunk_tokens):
    inputs = make()
    ours = loss_and_gradients(
        linear_cross_entropy, *inputs, reduction=reduction, backend=backend, chunk_tokens=chunk_tokens
    )
    assert worst_difference(ours, loss_and_gradients(plain, *inputs, reduction=reduction)) < 1e-14  # measured 1e-15


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no F.linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_the_operator_of_torch(reduction):
    inputs = make()
    ours = loss_and_gradients(linear_cross_entropy, *inputs, reduction=reduction, chunk_tokens=5)
    theirs = loss_and_gradients(F.linear_cross_entropy, *inputs, reduction=reduction)
    assert worst_difference(ours, theirs) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_precision_is_as_exact_as_plain_torch(dtype, reduction):
    exact = loss_and_gradients(plain, *make(200, 32, 300), reduction=reduction)
    inputs = make(200, 32, 300, dtype=dtype)
    ours = loss_and_gradients(linear_cross_entropy, *inputs, reduction=reduction, chunk_tokens=16)
    theirs = loss_and_gradients(plain, *inputs, reduction=reduction)
    assert ours[0].dtype == torch.float32
    assert [gradient.dtype for gradient in ours[1:]] == [dtype, dtype]
    assert worst_difference(ours, exact) <= 1.5 * worst_difference(theirs, exact)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_runs_the_matrix_products_narrow_and_the_rest_in_float32(reduction):
    exact = loss_and_gradients(plain, *make(200, 32, 300), reduction=reduction)
    inputs = make(200, 32, 300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, *inputs, reduction=reduction, chunk_tokens=16)
        theirs = loss_and_gradients(plain, *inputs, reduction=reduction)
    assert {part.dtype for part in ours} == {torch.float32}
    error = worst_difference(ours, exact)
    assert 1e-4 < error <= 1.5 * worst_difference(theirs, exact)
    with torch.autocast("cpu", torch.bfloat16):
        wide = make()
        doubles = loss_and_gradients(linear_cross_entropy, *wide)
    assert worst_difference(doubles, loss_and_gradients(plain, *wide)) < 1e-14


def test_mean_in_float16_survives_a_loss_scale():
    tokens, scale = 4096, 2.0**16
    hidden, weight, targets = make(tokens, 8, 16, dtype=torch.float16)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=512)
    (gradient,) = torch.autograd.grad(loss * scale, hidden)
    exact = torch.autograd.grad(plain(*(wide := make(tokens, 8, 16))), wide[0])[0]
    assert worst_difference([gradient.double() / scale], [exact]) < 5e-3  # measured 1.9e-3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    hidden, weight, targets = make(7, 3, 5, ignored=2)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction, chunk_tokens=2), (hidden, weight)
    )


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_computes_only_the_gradients_that_are_needed(frozen, reduction):
    inputs = make()
    inputs[frozen].requires_grad_(False)
    loss = linear_cross_entropy(*inputs, reduction=reduction, chunk_tokens=5)
    loss.sum().backward()
    full = make()
    plain(*full, reduction=reduction).sum().backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, full[1 - frozen].grad, rtol=1e-12, atol=1e-13)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(0, 40), st.integers(0, 10**6))
def test_any_chunking_and_any_ignored_tokens(tokens, vocabulary, chunk_tokens, ignored, seed):
    hidden, weight, targets = make(tokens, 3, vocabulary, ignored=min(ignored, tokens), seed=seed)
    ours = loss_and_gradients(
        linear_cross_entropy, hidden, weight, targets, reduction="none", chunk_tokens=chunk_tokens
    )
    theirs = loss_and_gradients(plain, hidden, weight, targets, reduction="none")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    total = linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_tokens=chunk_tokens)
    torch.testing.assert_close(total, theirs[0].sum(), rtol=1e-12, atol=1e-12)


def test_confident_predictions_keep_their_gradient_in_bfloat16():
    # p - 1 = -sigmoid(-7) = -9.1e-4; rounding p to bfloat16 first would give 0.
    hidden = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, torch.tensor([0])), hidden)
    torch.testing.assert_close(gradient[0, 0].float(), -torch.tensor(-7.0).sigmoid(), rtol=2**-8, atol=0)


def test_extreme_logits_do_not_overflow():
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, torch.tensor([0, 0]), reduction="none")
    assert loss.tolist() == [0.0, 2e4]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_ignored_tokens_may_hold_nan(backend):
    hidden, weight, targets = make(6, 3, 5, ignored=0)
    targets[2] = IGNORE
    with torch.no_grad():
        hidden[2] = torch.nan
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, backend=backend)
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(loss, plain(hidden[keep], weight, targets[keep]))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_no_targets(backend, tokens):
    hidden, weight, _ = make(tokens, 3, 5, ignored=0)
    targets = torch.full((tokens,), IGNORE)
    for reduction in ("sum", "none"):
        loss, *gradients = loss_and_gradients(
            linear_cross_entropy, hidden, weight, targets, reduction=reduction, backend=backend
        )
        assert loss.shape == (() if reduction == "sum" else (tokens,))
        assert all((part == 0).all() for part in (loss, *gradients))
    with pytest.raises(DomainError, match=f"mean loss needs a target, and all {tokens} are ignore_index = -100"):
        linear_cross_entropy(hidden, weight, targets, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bad", [-1, 29, 2**40])
def test_target_outside_the_vocabulary_is_named(backend, bad):
    hidden, weight, targets = make(ignored=3)
    places = (targets != IGNORE).nonzero()[:, 0]
    targets[places[[7, 9]]] = bad
    with pytest.raises(DomainError, match=rf"targets\[{places[7]}\] is {bad}; expected a token id in \[0, 29\)"):
        linear_cross_entropy(hidden, weight, targets, backend=backend)


def test_another_ignore_index():
    hidden, weight, targets = make()
    targets[targets == IGNORE] = 0
    ours = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, ignore_index=0)
    assert worst_difference(ours, loss_and_gradients(plain, hidden, weight, targets, ignore_index=0)) < 1e-14


def test_bad_arguments():
    hidden, weight, targets = make()
    with pytest.raises(
        ShapeError, match=r"\[tokens, channels\] and \[vocabulary, channels\]; got \[37, 8\] and \[29, 7\]"
    ):
        linear_cross_entropy(hidden, weight[:, :7], targets)
    with pytest.raises(ShapeError, match=r"targets must be \[37\].*got \[36\]"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ShapeError, match=r"weight has no rows"):
        linear_cross_entropy(hidden, weight[:0], targets)
    with pytest.raises(ShapeError, match=r"targets int64; got torch.float64 and torch.float32"):
        linear_cross_entropy(hidden, weight, targets.float())
    with pytest.raises(ShapeError, match=r"hidden is torch.float64, weight torch.float32"):
        linear_cross_entropy(hidden, weight.float(), targets)
    with pytest.raises(DomainError, match="reduction is 'median'"):
        linear_cross_entropy(hidden, weight, targets, reduction="median")
    with pytest.raises(DomainError, match="chunk_tokens is 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
    with pytest.raises(BackendError, match="backend is 'triton'"):
        linear_cross_entropy(hidden, weight, targets, backend="triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused_and_the_reference_has_it(reduction):
    hidden, weight, targets = make(7, 3, 5, ignored=2)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(BackendError, match="no second derivative"):
        gradient.square().sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction, backend="reference"), (hidden, weight)
    )


def test_backward_can_run_twice():
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operator_is_registered_correctly(reduction):
    hidden, weight, targets = make(7, 3, 5, ignored=2, dtype=torch.float32)
    arguments = (
        hidden,
        weight,
        targets,
        None,
        IGNORE,
        reduction,
        2,
        torch.float32,
        reduction == "mean",
        reduction == "mean",
    )
    torch.library.opcheck(linear_cross_entropy_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_without_graph_breaks(reduction):
    inputs = make(dtype=torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    ours = loss_and_gradients(compiled, *inputs, reduction=reduction, chunk_tokens=5)
    assert worst_difference(ours, loss_and_gradients(linear_cross_entropy, *inputs, reduction=reduction)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        narrow = loss_and_gradients(compiled, *inputs, reduction=reduction, chunk_tokens=5)
        assert (
            worst_difference(
                narrow, loss_and_gradients(linear_cross_entropy, *inputs, reduction=reduction, chunk_tokens=5)
            )
            < 1e-2
        )


def test_default_chunk_bounds_the_logits():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_chunk_tokens(8192, cpu) == 128
    assert default_chunk_tokens(8192, gpu) == 8192
    assert default_chunk_tokens(10**6, cpu) == 64


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status to read the peak from")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_stays_far_below_the_logits(reduction):
    """N = 16,384 and V = 8,192: the logits alone would take 537 MB."""
    program = f"""
import re, torch
from resnet_bk.ops.linear_cross_entropy import linear_cross_entropy
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def run(tokens, vocabulary):
    hidden, weight = torch.randn(tokens, 16, requires_grad=True), torch.randn(vocabulary, 16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    linear_cross_entropy(hidden, weight, targets, reduction="{reduction}").sum().backward()
run(64, 64)
before = peak()
run(16384, 8192)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16384 * 8192 * 4 / 8  # measured 13 MB; plain PyTorch 1,613 MB


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(300, 64, 1000), (131, 33, 77)])
def test_cuda_is_as_exact_as_plain_torch(dtype, reduction, sizes):
    exact = loss_and_gradients(plain, *make(*sizes, device="cuda"), reduction=reduction)
    inputs = make(*sizes, dtype=dtype, device="cuda")
    ours = loss_and_gradients(linear_cross_entropy, *inputs, reduction=reduction, chunk_tokens=64)
    theirs = loss_and_gradients(plain, *inputs, reduction=reduction)
    assert worst_difference(ours, exact) <= 1.5 * worst_difference(theirs, exact)


@pytest.mark.gpu
def test_cuda_under_autocast_compile_and_bad_targets():
    hidden, weight, targets = make(300, 64, 1000, dtype=torch.float32, device="cuda")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, mode="reduce-overhead")
    with torch.autocast("cuda", torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
        for _ in range(3):
            again = [part.clone() for part in loss_and_gradients(compiled, hidden, weight, targets)]
    assert worst_difference(again, ours) < 1e-2
    targets[5] = 1000
    with pytest.raises(DomainError, match=r"targets\[5\] is 1000"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.gpu
def test_cuda_memory_stays_far_below_the_logits():
    hidden, weight, targets = make(2**17, 64, 50304, dtype=torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 2**17 * 50304 * 2 / 10
