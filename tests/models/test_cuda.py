"""The whole model on a GPU: equal to the CPU, trainable in bfloat16, decodable."""

from __future__ import annotations

import pytest
import torch

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.resolvent import GreenState, causal_resolvent
from resnet_bk.ops.semiseparable import MixState, rotary_frequencies, semiseparable_mix

pytestmark = pytest.mark.gpu


def _model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=64, d_model=64, num_layers=2, feed_forward_dim=96, state_size=32))


def _relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double().cpu() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("time", [1, 63, 65, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_operators_equal_the_float64_reference(time, packed):
    generator = torch.Generator().manual_seed(time)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bounds = torch.tensor([0, time // 3, time // 2, time]) if packed and time > 1 else None
    rows, batch = (3, 1) if bounds is not None else (2, 2)
    operands = {
        "query": draw(batch, time, 32),
        "key": draw(batch, time, 32),
        "value": draw(batch, time, 3, 16),
        "detuning": draw(batch, time, 3),
        "absorption": draw(batch, time, 3).abs() + 0.05,
        "query_bias": draw(3, 32),
        "key_bias": draw(3, 32),
        "skip": draw(3),
        "memory": draw(rows, 3, 32, 16),
        "gate": draw(batch, time, 48),
        "weight": draw(48),
    }
    results = {}
    for name, device, dtype, backend in (
        ("truth", "cpu", torch.float64, "reference"),
        ("cpu", "cpu", torch.float32, "chunked"),
        ("cuda", "cuda", torch.float32, "chunked"),
    ):
        x = {key: tensor.to(device, dtype).requires_grad_() for key, tensor in operands.items()}
        cuts = None if bounds is None else bounds.to(device)
        wall = GreenState(torch.zeros(3, device=device, dtype=dtype), torch.ones(3, device=device, dtype=dtype))
        m, _ = causal_resolvent(x["detuning"], x["absorption"], initial=wall, cu_seqlens=cuts, backend=backend)
        y, state = semiseparable_mix(
            x["query"],
            x["key"],
            x["value"],
            -m[1],
            source=m[0],
            query_bias=x["query_bias"],
            key_bias=x["key_bias"],
            frequencies=rotary_frequencies(32, 1e4, device=device),
            skip=x["skip"],
            scale=0.2,
            initial=MixState(x["memory"], torch.full((rows,), 5, device=device)),
            cu_seqlens=cuts,
            backend=backend,
        )
        out = gated_norm(y, x["gate"], x["weight"], backend=backend)
        loss = (out.sin().sum() + state.memory.cos().sum()) / time
        gradients = torch.autograd.grad(loss, list(x.values()))
        results[name] = dict(zip(("out", "memory", *x), (out, state.memory, *gradients), strict=True))
    for key, truth in results["truth"].items():
        floor = 1e-6
        assert _relative(results["cuda"][key], truth) <= 2 * _relative(results["cpu"][key], truth) + floor, key


def test_logits_equal_those_of_the_cpu():
    model = _model()
    ids = torch.randint(0, 64, (2, 200), generator=torch.Generator().manual_seed(1))
    on_cpu = model(ids).logits.detach()
    on_gpu = model.cuda()(ids.cuda()).logits.detach().cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=2e-5)


def test_bfloat16_training_lowers_the_loss():
    model = _model().cuda()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=3e-3, fused=True)
    ids = torch.arange(512, device="cuda").remainder(7).view(2, 256)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses[-1] < 0.2 * losses[0]


def test_decoding_continues_the_prompt():
    model = _model().cuda().eval()
    ids = torch.randint(0, 64, (1, 90), device="cuda")
    with torch.no_grad():
        whole = model(ids).logits
        state = model(ids[:, :70]).state
        for t in range(70, 90):
            step = model(ids[:, t : t + 1], state=state)
            state = step.state
            torch.testing.assert_close(step.logits[:, 0], whole[:, t], rtol=0, atol=2e-5)
