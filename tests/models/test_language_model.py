"""The language model: causality, streaming, segments, loss, precision, initialisation and refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.models.config import PRESETS

VOCABULARY = 19
SIZES = dict(vocab_size=VOCABULARY, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=8)
OPTIONS = {
    "default": {},
    "wall": dict(boundary="wall", kernel="transmission", source="free"),
    "green": dict(kernel="green", source="unit"),
    "phases": dict(phase_coupling=True),
    "semiclassical": dict(dynamics="semiclassical", phase_coupling=True),
    "decay": dict(dynamics="decay_only"),
    "no shift": dict(key_shift=False, rotary_fraction=1.0),
    "untied": dict(tie_embeddings=False),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


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


def tensors(state):
    found = []
    state.map(lambda tensor: found.append(tensor) or tensor)
    return found


def same(one, two):
    return all((a - b).abs().max() < 1e-10 for a, b in zip(tensors(one), tensors(two), strict=True))


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_past_logits_are_bit_identical_whatever_the_future(options, dtype):
    model, ids = build(dtype, **options), draw(2, 150)
    model.segment_tokens = 128  # the future of a segment is no different
    with torch.no_grad():
        before = model(ids).logits
        for place in (1, 63, 64, 100, 149):
            changed = ids.clone()
            changed[:, place:] = draw(2, 150 - place, seed=place)
            changed[:, place] = (ids[:, place] + 1) % VOCABULARY
            after = model(changed).logits
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place], before[:, place])


@every_option
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
    bounds = [0, 1, 9, 40]
    packed = model(ids[:1], cu_seqlens=torch.tensor(bounds))
    for document, (left, right) in enumerate(pairwise(bounds)):
        alone = model(ids[:1, left:right])
        assert (packed.logits[:, left:right] - alone.logits).abs().max() < 1e-10  # measured 1e-14
        assert same(packed.state.select(torch.tensor([document])), alone.state)


@every_option
def test_segments_change_neither_loss_nor_gradients(options):
    model, ids = build(**options).train(), draw(2, 230)
    results = []
    for limit in (8192, 64):
        model.segment_tokens = limit
        out = model(ids, labels=ids)
        gradients = torch.autograd.grad(out.loss, list(model.parameters()))
        results.append((out.loss, *gradients, *(x.double() for x in tensors(out.state))))
    for whole, segmented in zip(*results, strict=True):
        assert (segmented - whole).abs().max() / whole.abs().max().clamp(min=1) < 1e-10  # measured 2e-14


def test_packed_documents_are_recomputed_without_being_cut():
    model, ids = build().train(), draw(1, 200)
    bounds = torch.tensor([0, 70, 71, 200])
    losses, gradients = [], []
    for limit in (8192, 64):
        model.segment_tokens = limit
        losses.append(model(ids, labels=ids, cu_seqlens=bounds).loss)
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


class TestLoss:
    def test_is_the_cross_entropy_of_shifted_logits(self):
        model, ids = build(), draw(2, 30)
        out = model(ids, labels=ids, return_logits=True)
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert (out.loss - expected).abs() < 1e-12  # measured 4e-16

    def test_ignores_minus_100_and_other_documents(self):
        model, ids = build(), draw(1, 30)
        labels = ids.clone()
        labels[0, [3, 4, 20]] = -100
        bounds = [0, 1, 12, 30]
        out = model(ids, labels=labels, cu_seqlens=torch.tensor(bounds), return_logits=True)
        counted = [t for t in range(1, 30) if t not in (3, 4, 20) and t not in bounds]
        expected = F.cross_entropy(out.logits[0, [t - 1 for t in counted]], ids[0, counted])
        assert (out.loss - expected).abs() < 1e-12

    def test_logits_come_without_labels_or_on_request(self):
        model, ids = build(), draw(1, 5)
        assert model(ids).loss is None
        assert model(ids).logits.shape == (1, 5, VOCABULARY)
        assert model(ids, labels=ids).logits is None
        assert model(ids, return_logits=False).logits is None
        assert model(ids, labels=ids, return_logits=True).logits is not None

    def test_starts_at_the_logarithm_of_the_vocabulary(self):
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig.preset("tiny", vocab_size=64))
        ids = torch.randint(0, 64, (4, 100))
        assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(64), abs=0.1)  # measured 0.03

    def test_without_targets_is_refused(self):
        with pytest.raises(DomainError, match="target"):
            build()(draw(2, 1), labels=draw(2, 1))


@every_option
def test_every_parameter_gets_a_finite_gradient_from_the_start(options):
    torch.manual_seed(0)
    model, ids = LanguageModel(ModelConfig(**SIZES, **options)), draw(2, 70)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Phases of a medium without potential are zero; their scale starts to move when the potential has.
        assert parameter.grad.abs().max() > 0 or name.endswith("phase_scale"), name


@every_option
def test_bfloat16_and_autocast_train_and_stay_near_float64(options):
    ids = draw(2, 70)
    exact = build(**options)(ids, labels=ids).loss
    # One rounding of every weight against one of every matrix product's operands.
    narrow = build(torch.bfloat16, **options)
    wide = build(torch.float32, **options)
    losses = [narrow(ids, labels=ids).loss]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses.append(wide(ids, labels=ids).loss)
    for model, loss in zip((narrow, wide), losses, strict=True):
        assert loss.dtype == torch.float32
        assert (loss - exact).abs() < 0.1  # measured 0.01, of 3.6 nats
        loss.backward()
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_groups_hold_every_parameter_once_and_decay_matrices_only(tied):
    model = LanguageModel(ModelConfig(**SIZES, phase_coupling=True, tie_embeddings=tied))
    decayed, plain = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(found) == sorted(names)
    suffixes = {names[id(p)].removesuffix(".weight").rsplit(".")[-1] for p in decayed["params"]}
    assert suffixes == {"embedding", "in_proj", "out_proj"} | (set() if tied else {"head"})
    assert (model.output_weight is model.embedding.weight) == tied


@pytest.mark.parametrize(
    ("preset", "millions"), [("tiny", 1), ("small", 10), ("base", 130), ("large", 350), ("xl", 1300), ("10b", 10000)]
)
def test_presets_have_the_sizes_of_their_names(preset, millions):
    assert list(PRESETS) == ["tiny", "small", "base", "large", "xl", "10b"]
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.preset(preset))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.2)  # measured 0.17 (tiny), 0.04 (others)
    embeddings = model.embedding.weight.numel() * (1 if model.config.tie_embeddings else 2)
    assert model.num_parameters(embeddings=False) == model.num_parameters() - embeddings


def test_a_seed_decides_every_parameter():
    def parameters(seed):
        torch.manual_seed(seed)
        return list(LanguageModel(ModelConfig(**SIZES)).parameters())

    assert all(torch.equal(one, two) for one, two in zip(parameters(3), parameters(3), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(parameters(3), parameters(4), strict=True))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, ids = LanguageModel(ModelConfig(**SIZES, dropout=0.5)), draw(1, 30)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_state_is_constant_in_size_and_detaches():
    model = build(phase_coupling=True)
    short, long = model(draw(1, 2)).state, model(draw(1, 300)).state
    assert short.num_bytes == long.num_bytes == sum(x.untyped_storage().nbytes() for x in tensors(long))
    assert any(x.requires_grad for x in tensors(long))
    assert not any(x.requires_grad for x in tensors(long.detach()))
    pair = model(draw(2, 30)).state
    assert all(torch.equal(a[0], b[1]) for a, b in zip(
        tensors(pair), tensors(pair.select(torch.tensor([1, 0]))), strict=True))  # fmt: skip


@pytest.mark.slow
def test_compiles_as_one_graph_with_gradients():
    model, ids = build(torch.float32, num_layers=1).train(), draw(2, 100)
    parameters = list(model.parameters())
    expected = model(ids, return_logits=True).logits
    compiled = torch.compile(model, fullgraph=True)(ids, return_logits=True).logits
    assert (compiled - expected).abs().max() / expected.abs().max() < 2e-5  # measured 2e-6
    gradients = [torch.autograd.grad(logits.square().mean(), parameters) for logits in (expected, compiled)]
    for one, two in zip(*gradients, strict=True):
        assert (one - two).abs().max() / one.abs().max() < 1e-4  # measured 3e-6


class TestBadInput:
    @pytest.mark.parametrize(("token", "row", "place"), [(VOCABULARY, 1, 4), (-1, 0, 0), (10**9, 1, 8)])
    def test_a_token_outside_the_vocabulary(self, token, row, place):
        ids = draw(2, 9)
        ids[row, place] = token
        with pytest.raises(
            DomainError, match=rf"holds {token} at row {row}, position {place}; expected ids in \[0, 19\)"
        ):
            build()(ids)

    def test_the_first_bad_token_is_named(self):
        ids = draw(1, 9)
        ids[0, [2, 5]] = torch.tensor([VOCABULARY + 1, -3])
        with pytest.raises(DomainError, match="holds 20 at row 0, position 2"):
            build()(ids)

    @pytest.mark.parametrize(
        "ids", [torch.zeros(9).long(), torch.zeros(1, 0).long(), torch.zeros(2, 3), torch.zeros(2, 3).bool()]
    )
    def test_ids_that_are_not_batch_by_time(self, ids):
        with pytest.raises(ShapeError, match="input_ids must be non-empty int64 or int32"):
            build()(ids)

    def test_labels_of_another_shape(self):
        with pytest.raises(ShapeError, match=r"labels have shape \[2, 8\]; expected that of input_ids, \[2, 9\]"):
            build()(draw(2, 9), labels=draw(2, 8))

    def test_a_label_outside_the_vocabulary(self):
        ids = draw(2, 9)
        with pytest.raises(DomainError, match=str(VOCABULARY)):
            build()(ids, labels=torch.full_like(ids, VOCABULARY))

    @every_option
    def test_a_state_of_other_rows_or_another_model(self, options):
        model = build(**options)
        for rows in (1, 3):
            with pytest.raises(ShapeError, match=f"state holds 2 layers of {rows} sequences; expected 2 of 2"):
                model(draw(2, 4), state=model(draw(rows, 4)).state)
        state = model(draw(2, 4)).state
        with pytest.raises(ShapeError, match="state holds 1 layers of 2 sequences; expected 2 of 2"):
            model(draw(2, 4), state=state._replace(layers=state.layers[:1]))

    def test_boundaries_that_do_not_cover_the_tokens(self):
        with pytest.raises(ShapeError, match="from 0 to the 9 tokens given"):
            build()(draw(1, 9), cu_seqlens=torch.tensor([0, 8]))

    def test_parameters_that_became_nan(self):
        model = build()
        with torch.no_grad():
            model.embedding.weight[7] = torch.nan
        ids = torch.full((1, 4), 3)
        assert model(ids).logits[..., :7].isfinite().all()
        with pytest.raises(DomainError, match="absorption is nan"):
            model(torch.full((1, 4), 7))
