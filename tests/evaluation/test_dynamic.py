"""Dynamic evaluation: what it may know, what it leaves behind, and that it learns."""

import numpy as np
import pytest
import torch

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.errors import DomainError
from resnet_bk.evaluation import dynamic
from resnet_bk.evaluation.dynamic import evaluate_dynamic
from resnet_bk.evaluation.perplexity import evaluate_stream

SIZES = dict(vocab_size=29, d_model=32, num_layers=2, feed_forward_dim=32, head_dim=16, state_size=8)


def model_of(mixer="resolvent", **changes):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**SIZES, attention_head_dim=16, mixer=mixer, **changes))


def text(seed, length):
    return np.random.default_rng(seed).integers(0, 29, length)


@pytest.mark.parametrize("mixer", ["resolvent", "attention", "mamba2", "mamba3"])
def test_rate_zero_is_the_evaluation_of_the_stream(mixer):
    model = model_of(mixer, dropout=0.5)
    found = evaluate_dynamic(model, text(0, 200), text(1, 300), rate=0.0, decay=0.0, segment_length=32, text_bytes=400)
    expected = evaluate_stream(model, text(0, 200), segment_length=64, text_bytes=400)
    assert found.tokens == expected.tokens == 199
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)


def test_a_text_that_repeats_is_learned_and_the_parameters_come_back():
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    repeated = np.tile(text(2, 20), 30)
    static = evaluate_stream(model, repeated, segment_length=64)
    found = evaluate_dynamic(model, repeated, text(1, 600), rate=3e-4, decay=0.0, segment_length=16)
    assert found.loss < static.loss - 0.3
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    stronger = evaluate_dynamic(model, repeated, text(1, 600), rate=3e-4, decay=1.0, segment_length=16)
    assert found.loss < stronger.loss  # all the way back after every segment: only the last one is remembered


def test_no_step_is_longer_than_those_of_the_training_text(monkeypatch):
    model, tokens = model_of(), text(0, 80)
    through, factors = dynamic._gradient_sizes, {"none": 0.0, "usual": 1.0, "any": 1e9}
    losses = {}
    for name, factor in factors.items():
        scaled = lambda *given, by=factor: (through(*given)[0], through(*given)[1] * by)  # noqa: E731
        monkeypatch.setattr(dynamic, "_gradient_sizes", scaled)
        losses[name] = evaluate_dynamic(model, tokens, text(1, 80), rate=1e-2, decay=0.0, segment_length=16).loss
    assert losses["none"] == pytest.approx(evaluate_stream(model, tokens, segment_length=64).loss, rel=1e-6)
    assert len(set(losses.values())) == 3

    # The length of a step by its definition, from gradients that are kept here one by one.
    sizes, longest = through(model, text(1, 49), 16, 2)
    lengths = []
    for start in (0, 16):
        ids = torch.as_tensor(text(1, 49)[start : start + 17])
        dynamic._differentiate(model, dynamic._segment_losses(model, ids, None)[0])
        lengths.append(sum((p.grad / size).square().sum() for p, size in zip(model.parameters(), sizes, strict=True)))
    assert longest.item() == pytest.approx(torch.stack(lengths).mean().sqrt().item(), rel=1e-5)


def test_under_autocast_every_segment_is_read_with_the_parameters_of_its_time():
    model, repeated = model_of(), np.tile(text(2, 20), 30)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate_dynamic(model, repeated, text(1, 600), rate=3e-4, decay=0.0, segment_length=16)
        after = evaluate_stream(model, repeated, segment_length=64)
    exact = evaluate_dynamic(model, repeated, text(1, 600), rate=3e-4, decay=0.0, segment_length=16)
    assert found.loss == pytest.approx(exact.loss, rel=0.02)
    assert after.loss == pytest.approx(evaluate_stream(model, repeated, segment_length=64).loss, rel=0.01)


def test_losses_do_not_depend_on_what_follows(monkeypatch):
    taken = []
    through = dynamic._losses
    monkeypatch.setattr(dynamic, "_losses", lambda *given: (taken.append(part) or part for part in through(*given)))
    first, second = text(3, 100), text(3, 100)
    second[50:] = text(4, 50)
    model = model_of()
    for tokens in (first, second):
        evaluate_dynamic(model, tokens, text(1, 300), rate=1e-3, segment_length=16)
    ours, theirs = torch.cat(taken[: len(taken) // 2]), torch.cat(taken[len(taken) // 2 :])
    assert torch.equal(ours[:49], theirs[:49])
    assert not torch.equal(ours[49:], theirs[49:])


@pytest.mark.parametrize("values", [{"rate": -1.0}, {"rate": 1e-3, "decay": 2.0}, {"rate": float("nan")}])
def test_numbers_out_of_range_are_refused(values):
    with pytest.raises(DomainError, match="rate is"):
        evaluate_dynamic(model_of(), text(0, 50), text(1, 50), **values)


def test_a_rate_that_diverges_is_an_error_and_the_parameters_come_back():
    model = model_of()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(DomainError, match=r"finite"):
        evaluate_dynamic(model, text(0, 400), text(1, 300), rate=1e30, segment_length=16)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
