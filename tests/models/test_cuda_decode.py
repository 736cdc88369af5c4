"""Decoding on a GPU: a captured graph says what separate steps and the CPU say, in constant memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.errors import DomainError
from resnet_bk.models import decode
from resnet_bk.models.decode import Decoder, captures
from resnet_bk.models.generate import complete, stream
from resnet_bk.models.prefill import evaluate, prefill
from resnet_bk.models.sampling import GenerationConfig

pytestmark = pytest.mark.gpu

VOCABULARY = 300
GREEDY = GenerationConfig(temperature=0.0)
SAMPLED = dict(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=7)


def make_model(dtype=torch.float32, device="cuda", **options) -> LanguageModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, d_model=64, num_layers=3, feed_forward_dim=96, head_dim=32, state_size=32)
    model = LanguageModel(ModelConfig(**sizes, tie_embeddings=False, **options))
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.output_weight.normal_(std=0.3)  # logits of a few units: decisive, not certain
        for name, parameter in model.named_parameters():
            if name.endswith(("_bias", "potential_scale", "skip")):  # nothing rests at a neutral start
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().to(device, dtype)


def make_prompts(lengths=(5, 1, 64, 200, 2, 130)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


def without_graphs(monkeypatch):
    monkeypatch.setattr(decode, "captures", lambda _: False)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "changes", [{}, {"source": "free"}, {"source": "unit"}, {"key_shift": False}], ids=lambda c: "-".join(map(str, c))
)
def test_graph_and_separate_steps_and_cpu_say_the_same(monkeypatch, changes, options):
    model, on_cpu = make_model(**changes), make_model(device="cpu", **changes)
    assert captures(model)
    ours = complete(model, make_prompts(), max_new_tokens=40, **options)
    theirs = complete(on_cpu, make_prompts(), max_new_tokens=40, **options)
    assert ours.sequences == theirs.sequences
    for mine, other in zip(ours.log_probabilities, theirs.log_probabilities, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=1e-3, atol=1e-3)
    without_graphs(monkeypatch)
    assert complete(model, make_prompts(), max_new_tokens=40, **options).sequences == ours.sequences


def test_rows_that_end_at_different_places(monkeypatch):
    """Half of the rows end and a smaller graph is captured; the others keep their tokens."""
    model, prompts = make_model(), make_prompts()
    free = complete(model, prompts, max_new_tokens=30).sequences
    settings = dict(max_length=210, max_new_tokens=30, stop_tokens=[free[0][8], free[2][70], free[5][135]])
    ours = complete(model, prompts, **settings)
    lengths = {len(ids) - n for ids, n in zip(ours.sequences, ours.prompt_lengths, strict=True)}
    assert len(lengths) >= 3
    without_graphs(monkeypatch)
    theirs = complete(model, prompts, **settings)
    assert (theirs.sequences, theirs.finish_reasons) == (ours.sequences, ours.finish_reasons)


def test_bfloat16_steps_are_the_captured_ones(monkeypatch):
    model = make_model(torch.bfloat16)
    ours = complete(model, make_prompts(), max_new_tokens=30)
    without_graphs(monkeypatch)
    assert complete(model, make_prompts(), max_new_tokens=30).sequences == ours.sequences


@torch.no_grad()
def test_state_after_steps_is_that_of_the_prefill():
    model, steps = make_model(), 25
    prompts = make_prompts((40, 40))
    decoder = Decoder(model, *prefill(model, prompts), GREEDY)
    choices = [decoder.choose()] + [decoder.step() for _ in range(steps)]
    assert decoder._graph is not None
    tokens = torch.tensor([choice.read()[0] for choice in choices])
    ids = torch.cat((torch.stack(prompts), tokens.T[:, :-1]), dim=1)
    hidden, state = evaluate(model, ids.cuda())
    assert torch.equal(F.linear(hidden[:, -1], model.output_weight).argmax(1).cpu(), tokens[-1])
    for ours, theirs in zip(decoder.state.layers, state.layers, strict=True):
        assert torch.equal(ours.mix.position, theirs.mix.position)
        for mine, other in zip((ours.mix.memory, *ours.green), (theirs.mix.memory, *theirs.green), strict=True):
            assert (mine - other).norm() / other.norm() < 2e-5


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(SAMPLED)], ids=["greedy", "sampled"])
def test_steps_take_no_memory_and_do_not_wait(options):
    model, prompts = make_model(), make_prompts()
    config = GenerationConfig(**options)
    hidden, state = prefill(model, prompts)
    seen = torch.zeros(len(prompts), VOCABULARY, dtype=torch.bool, device="cuda")
    decoder = Decoder(model, hidden, state, config, seen if config.repetition_penalty != 1 else None)
    uniform = None if config.temperature == 0 else torch.rand(len(prompts), dtype=torch.float64)
    decoder.choose(uniform)
    for _ in range(3):
        last = decoder.step(uniform)
    last.read()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(50):
            last = decoder.step(uniform)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    last.read()
    assert torch.cuda.memory_allocated() == before


@torch.no_grad()
def test_a_forward_pass_leaves_the_state_it_was_given():
    model = make_model()
    ids = make_prompts((30,))[0][None].cuda()
    state = model(ids).state
    kept = state.map(torch.clone)
    first, second = (model(ids[:, :1], state=state) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    left: list[torch.Tensor] = []
    for side in (state, kept, first.state, second.state):
        side.map(lambda tensor: left.append(tensor) or tensor)
    count = len(left) // 4
    assert all(torch.equal(a, b) for a, b in zip(left[:count], left[count : 2 * count], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(left[2 * count : 3 * count], left[3 * count :], strict=True))
    assert (first.state.layers[0].mix.position == state.layers[0].mix.position + 1).all()


@pytest.mark.parametrize(
    "options",
    [dict(phase_coupling=True), dict(dynamics="decay_only"), dict(dynamics="semiclassical"), dict(kernel="green")],
    ids=str,
)
def test_options_that_the_step_does_not_know_run_without_a_graph(options):
    model = make_model(**options)
    assert not captures(model)
    ours = complete(model, make_prompts(), max_new_tokens=10)
    assert ours.sequences == complete(make_model(device="cpu", **options), make_prompts(), max_new_tokens=10).sequences


def test_hooks_autocast_and_float64_run_without_a_graph():
    model = make_model()
    expected = complete(model, make_prompts(), max_new_tokens=10).sequences
    calls = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    assert not captures(model)
    assert complete(model, make_prompts(), max_new_tokens=10).sequences == expected
    assert len(calls) >= 10
    handle.remove()
    assert captures(model)
    with torch.autocast("cuda", torch.bfloat16):
        assert not captures(model)
    assert not captures(model.double())
    assert complete(model, make_prompts(), max_new_tokens=10).sequences == expected


def test_damaged_weights_are_reported_and_the_device_lives_on():
    model = make_model()
    tokens = stream(model, make_prompts(), max_new_tokens=20, temperature=1.0, seed=0)
    next(tokens)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(DomainError, match=r"logits for prompt \d are not finite"):
        list(tokens)
    torch.cuda.synchronize()
    model.norm.weight.data[3] = 1.0
    assert len(complete(model, [[1, 2]], max_new_tokens=4).sequences[0]) == 6
