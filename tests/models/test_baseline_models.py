"""Baselines and hybrids as language models: the interface of the library's own model, and its guarantees."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.errors import ConfigError, ShapeError
from resnet_bk.models.generate import complete
from resnet_bk.models.prefill import evaluate, memory_needed, prefill

VOCABULARY = 19
SIZES = dict(
    vocab_size=VOCABULARY, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=8, attention_head_dim=8
)
KINDS = {
    "attention": dict(mixer="attention"),
    "window": dict(mixer="attention", attention_window=5),
    "mamba2": dict(mixer="mamba2"),
    "mamba3": dict(mixer="mamba3"),
    "hybrid": dict(attention_every=2),
    "mamba2-hybrid": dict(mixer="mamba2", attention_every=2),
    "mamba3-hybrid": dict(mixer="mamba3", attention_every=2, attention_window=5),
    "hybrid-window": dict(attention_every=2, attention_window=70),
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def build(dtype=torch.float64, **options):
    """A model in evaluation mode whose per-head parameters have left their neutral start."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SIZES | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def draw(batch, time, seed=1):
    return torch.randint(0, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def same(one, two):
    return all((a - b).abs().max() < 1e-10 for a, b in zip(one.tensors, two.tensors, strict=True))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_past_logits_are_bit_identical_whatever_the_future(options, dtype):
    model, ids = build(dtype, **options), draw(2, 150)
    model.segment_tokens = 128
    with torch.no_grad():
        before = model(ids).logits
        for place in (1, 63, 64, 100, 149):
            changed = ids.clone()
            changed[:, place:] = draw(2, 150 - place, seed=place)
            changed[:, place] = (ids[:, place] + 1) % VOCABULARY
            after = model(changed).logits
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place], before[:, place])


@every_kind
def test_split_decode_and_packed_are_one_run(options):
    model, ids = build(**options), draw(2, 40)
    whole = model(ids)
    first = model(ids[:, :17])
    second = model(ids[:, 17:], state=first.state)
    assert (torch.cat((first.logits, second.logits), 1) - whole.logits).abs().max() < 1e-10  # measured 1e-14
    assert same(second.state, whole.state)
    with torch.no_grad():
        state, logits = None, []
        for token in ids.split(1, dim=1):
            out = model(token, state=state)
            state = out.state
            logits.append(out.logits)
    assert (torch.cat(logits, 1) - whole.logits).abs().max() < 1e-10  # measured 1e-14
    assert same(state, whole.state)
    bounds = torch.tensor([0, 1, 9, 40])
    packed = model(ids[:1], cu_seqlens=bounds)
    again = model(ids[1:], state=packed.state, cu_seqlens=bounds)
    for document, (left, right) in enumerate(pairwise(bounds.tolist())):
        alone = model(ids[:1, left:right])
        assert (packed.logits[:, left:right] - alone.logits).abs().max() < 1e-10  # measured 1e-14
        following = model(ids[1:, left:right], state=alone.state)
        assert (again.logits[:, left:right] - following.logits).abs().max() < 1e-10  # measured 1e-14
        row = again.state.select(torch.tensor([document]))
        one = model(ids[:1, :3], state=row).logits
        assert (one - model(ids[:1, :3], state=following.state).logits).abs().max() < 1e-10  # measured 1e-14


@every_kind
def test_segments_change_neither_loss_nor_gradients(options):
    model, ids = build(**options).train(), draw(2, 230)
    results = []
    for limit in (8192, 64):
        model.segment_tokens = limit
        out = model(ids, labels=ids)
        gradients = torch.autograd.grad(out.loss, list(model.parameters()))
        results.append((out.loss, *gradients, *(x.double() for x in out.state.tensors)))
    for whole, segmented in zip(*results, strict=True):
        assert (segmented - whole).abs().max() / whole.abs().max().clamp(min=1) < 1e-10  # measured 2e-14


@every_kind
def test_every_parameter_gets_a_finite_gradient_from_the_start(options):
    torch.manual_seed(0)
    model, ids = LanguageModel(ModelConfig(**SIZES | options)), draw(2, 70)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_kind
def test_bfloat16_and_autocast_train_and_stay_near_float64(options):
    ids = draw(2, 70)
    exact = build(**options)(ids, labels=ids).loss
    narrow = build(torch.bfloat16, **options)
    wide = build(torch.float32, **options)
    losses = [narrow(ids, labels=ids).loss]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = wide(ids[:, :9]).state
        losses.append(wide(ids, labels=ids).loss)
        assert wide(ids[:, 9:], state=state).logits.isfinite().all()
    for model, loss in zip((narrow, wide), losses, strict=True):
        assert loss.dtype == torch.float32
        assert (loss - exact).abs() < 0.1  # measured 0.02, of 3.6 nats
        loss.backward()
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@every_kind
def test_is_saved_and_loaded(tmp_path, options):
    model = build(torch.float32, **options)
    loaded = LanguageModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert loaded.config == model.config
    assert [type(block.mixer) for block in loaded.blocks] == [type(block.mixer) for block in model.blocks]
    assert torch.equal(loaded(draw(1, 9)).logits, model(draw(1, 9)).logits)


@every_kind
@torch.no_grad()
def test_generates_what_running_the_whole_sequence_again_does(options):
    model = build(torch.float64, **options)
    prompts = [draw(1, length, seed=length)[0] for length in (3, 70, 1, 8)]
    model.segment_tokens = 64
    hidden, state = prefill(model, prompts)
    alone = torch.cat([evaluate(model, prompt[None])[0][:, -1] for prompt in prompts])
    assert (hidden - alone).abs().max() < 1e-10  # measured 1e-14
    assert state.tensors[0].shape[0] == 4
    output = complete(model, prompts, max_new_tokens=6, temperature=0)
    for prompt, sequence in zip(prompts, output.sequences, strict=True):
        ids = prompt.tolist()
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert sequence == ids


@every_kind
def test_parameter_groups_decay_matrices_only(options):
    model = LanguageModel(ModelConfig(**SIZES | options))
    decayed, plain = model.parameter_groups(0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(found) == sorted(names)
    assert {names[id(p)].removesuffix(".weight").rsplit(".")[-1] for p in decayed["params"]} == {
        "embedding",
        "in_proj",
        "out_proj",
    }


@every_kind
def test_memory_estimate_knows_the_state(options):
    model = build(torch.float32, **options)
    needed = memory_needed(model.config, [40, 40], 64)
    state = evaluate(model, draw(2, 40))[1]
    assert 0.25 * needed["states"] < state.num_bytes < 0.6 * needed["states"]


@pytest.mark.gpu
@every_kind
def test_a_gpu_says_the_same(options):
    torch.manual_seed(0)
    sizes = dict(head_dim=16, state_size=32, d_model=64, attention_head_dim=32)
    model = LanguageModel(ModelConfig(**SIZES | sizes | options))
    ids, bounds = draw(2, 200), torch.tensor([0, 70, 71, 200])
    exact = model.double()(ids).logits
    packed = model(ids[:1], cu_seqlens=bounds).logits
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model = model.float().cuda()
    model.zero_grad()
    ids, bounds = ids.cuda(), bounds.cuda()
    first = model(ids[:, :90])
    state, parts = first.state, [first.logits]
    with torch.no_grad():
        for piece in ids[:, 90:].split([100, 1, 9], dim=1):
            out = model(piece, state=state)
            state = out.state
            parts.append(out.logits)
    assert (torch.cat(parts, 1).cpu() - exact).norm() / exact.norm() < 5e-3
    assert (model(ids[:1], cu_seqlens=bounds).logits.cpu() - packed).norm() / packed.norm() < 5e-3
    model(ids, labels=ids).loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert (parameter.grad.cpu() - gradient).norm() / gradient.norm() < 2e-2, name
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        narrow = model(ids, labels=ids).loss
        assert (narrow - loss).abs() < 0.02
    narrow.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["window", "mamba2", "mamba3", "mamba3-hybrid"])
def test_without_attention_to_everything_the_state_is_bounded(kind):
    model = build(**KINDS[kind])
    assert model(draw(1, 30)).state.num_bytes == model(draw(1, 300)).state.num_bytes


def test_hybrids_mix_by_attention_in_every_so_many_blocks():
    config = ModelConfig(**SIZES | dict(num_layers=5, attention_every=2))
    assert config.mixers == ("resolvent", "attention", "resolvent", "attention", "resolvent")
    model = LanguageModel(config)
    assert [type(block.mixer).__name__ for block in model.blocks] == ["Mixer", "Attention"] * 2 + ["Mixer"]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (dict(mixer="mamba"), "model.mixer is 'mamba'; expected one of resolvent, attention, mamba2, mamba3"),
            (dict(attention_every=-1), "model.attention_every is -1; expected a whole number >= 0"),
            (dict(attention_every=3), "model.attention_every is 3, but there are only 2 blocks"),
            (dict(attention_window=1.5), "model.attention_window is 1.5"),
            (dict(mixer="mamba3", state_size=6), "model.state_size is 6; it must be a multiple of 4"),
            (dict(mixer="attention", attention_head_dim=12), "must be even and divide d_model = 16"),
            (dict(attention_every=1, attention_head_dim=1), "must be even and divide d_model = 16"),
        ],
    )
    def test_a_configuration_that_means_nothing(self, options, words):
        with pytest.raises(ConfigError, match=words):
            ModelConfig(**SIZES | options)

    @every_kind
    def test_a_state_of_other_rows(self, options):
        model = build(**options)
        with pytest.raises(ShapeError, match="state holds 2 layers of 3 sequences; expected 2 of 2"):
            model(draw(2, 4), state=model(draw(3, 4)).state)

    @every_kind
    def test_a_state_of_another_kind_of_model(self, options):
        with pytest.raises(ShapeError, match=r"layer \d is a \w+State; expected MixerState"):
            build()(draw(2, 4), state=build(**options)(draw(2, 4)).state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "window", "mamba2", "mamba3"])
def test_compiles_as_one_graph_with_gradients(kind):
    model, ids = build(torch.float32, **KINDS[kind] | dict(num_layers=1)).train(), draw(2, 100)
    parameters = list(model.parameters())
    expected = model(ids, return_logits=True).logits
    compiled = torch.compile(model, fullgraph=True)(ids, return_logits=True).logits
    assert (compiled - expected).abs().max() / expected.abs().max() < 2e-5  # measured 1e-6
    gradients = [torch.autograd.grad(logits.square().mean(), parameters) for logits in (expected, compiled)]
    for one, two in zip(*gradients, strict=True):
        assert (one - two).abs().max() / one.abs().max() < 1e-4  # measured 4e-6
