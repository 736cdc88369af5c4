from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.evaluation.perplexity import StreamEvaluation, evaluate_stream, log_spaced_bins, loss_by_position

VOCABULARY = 11


class RecurrentModel(nn.Module):
    """A GRU: another way to carry a state, so that nothing here depends on the library's own model."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, dtype=dtype)
        self.core = nn.GRU(8, 8, batch_first=True, dtype=dtype)
        self.dropout = nn.Dropout(0.5)
        self.output_weight = nn.Parameter(torch.randn(VOCABULARY, 8, dtype=dtype))
        self.longest = 0

    def hidden_states(self, input_ids, state=None):
        self.longest = max(self.longest, input_ids.shape[1])
        hidden, state = self.core(self.embedding(input_ids), state)
        return self.dropout(hidden), state


@pytest.fixture
def model() -> RecurrentModel:
    torch.manual_seed(0)
    return RecurrentModel()


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1000,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def whole_losses(model: RecurrentModel, tokens: torch.Tensor) -> torch.Tensor:
    """Plain computation of the loss of tokens[1:], nothing split."""
    hidden, _ = model.core(model.embedding(tokens[None]))
    log_probabilities = torch.log_softmax(hidden[0] @ model.output_weight.T, dim=-1)
    return -log_probabilities[:-1].gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("segment_length", [1, 2, 63, 64, 65, 998, 999, 1000, 5000])
def test_chunked_stream_equals_the_whole_sequence(model, stream, segment_length):
    result = evaluate_stream(model, stream, segment_length=segment_length, text_bytes=2500)
    losses = whole_losses(model, stream)
    assert (result.tokens, result.unpredicted_tokens) == (999, 1)
    assert result.nats == pytest.approx(losses.sum().item(), rel=1e-13)
    assert result.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(losses.sum().item() / math.log(2) / 2500, rel=1e-13)
    assert model.longest <= segment_length


def test_memory_mapped_tokens_give_the_same_result(model, stream, tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, stream.numpy().astype(np.uint16))
    mapped = np.load(path, mmap_mode="r")
    from_map = evaluate_stream(model, mapped, segment_length=100)
    assert from_map == evaluate_stream(model, stream, segment_length=100)
    assert from_map.bits_per_byte is None


def test_dropout_is_off_inside_and_back_on_after(model, stream):
    model.train()
    assert (
        evaluate_stream(model, stream, segment_length=50).nats == evaluate_stream(model, stream, segment_length=50).nats
    )
    assert model.training
    model.eval()
    evaluate_stream(model, stream, segment_length=50)
    assert not model.training


def test_perplexity_overflows_to_infinity():
    assert StreamEvaluation(tokens=1, unpredicted_tokens=1, nats=800.0, text_bytes=None).perplexity == math.inf


def test_loss_by_position_equals_per_token_means(model, stream):
    documents = [stream[:300], stream[300:340], stream[340:342], stream[342:]]
    losses = [whole_losses(model, document) for document in documents]
    bins = log_spaced_bins(700)
    assert bins[0] == 1 and bins[-1] == 1024
    found = loss_by_position(model, documents, segment_length=37, bins=bins)
    assert [b.start for b in found] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert sum(b.count for b in found) == 996
    for bin_ in found:
        # losses[d][i] belongs to the token with i + 1 tokens before it.
        groups = [part for part in (loss[bin_.start - 1 : bin_.stop - 1] for loss in losses) if len(part)]
        pooled = torch.cat(groups)
        assert (bin_.count, bin_.documents) == (len(pooled), len(groups))
        assert bin_.mean == pytest.approx(pooled.mean().item(), rel=1e-12)
        if len(groups) == 1:
            assert bin_.standard_error is None
            continue
        residuals = torch.stack([(group - pooled.mean()).sum() for group in groups])
        expected = (residuals.square().sum() * len(groups) / (len(groups) - 1)).sqrt() / len(pooled)
        assert bin_.standard_error == pytest.approx(expected.item(), rel=1e-9)


def test_standard_error_of_independent_tokens_is_the_usual_one(model):
    """With one token a document, the clustered error is the sample standard deviation over sqrt(n)."""
    tokens = torch.randint(0, VOCABULARY, (50, 2), generator=torch.Generator().manual_seed(2))
    (found,) = loss_by_position(model, list(tokens), segment_length=8, bins=[1, 2])
    losses = torch.cat([whole_losses(model, row) for row in tokens])
    assert found.standard_error == pytest.approx((losses.std() / math.sqrt(50)).item(), rel=1e-12)


def test_identical_documents_have_no_error(model, stream):
    found = loss_by_position(model, [stream[:20]] * 3, segment_length=5, bins=[1, 4, 16])
    assert [b.standard_error for b in found] == [pytest.approx(0, abs=1e-9)] * 2


@pytest.mark.parametrize("position", [0, 5, 19])
def test_id_beyond_the_vocabulary_is_located(model, stream, position):
    tokens = stream[:20].clone()
    tokens[position] = VOCABULARY
    with pytest.raises(DomainError, match=rf"Token {position} .* id {VOCABULARY}; expected .* \[0, {VOCABULARY}\)"):
        evaluate_stream(model, tokens, segment_length=4)


def test_loss_that_is_not_finite_is_located(model, stream):
    with torch.no_grad():
        model.output_weight[int(stream[7])] = math.nan
    with pytest.raises(DomainError, match="The loss of token 1 of the stream is nan"):
        evaluate_stream(model, stream[:20], segment_length=4)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(1, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long), torch.zeros(4), np.zeros(4)]
)
def test_tokens_must_be_one_row_of_integers(model, tokens):
    with pytest.raises(ShapeError, match="tokens has"):
        evaluate_stream(model, tokens, segment_length=4)


def test_arguments_out_of_range(model, stream):
    with pytest.raises(DomainError, match="segment_length is 0"):
        evaluate_stream(model, stream, segment_length=0)
    with pytest.raises(DomainError, match="text_bytes is 0"):
        evaluate_stream(model, stream, segment_length=4, text_bytes=0)
    with pytest.raises(DomainError, match="bins is"):
        loss_by_position(model, [stream], segment_length=4, bins=[4, 2])
    with pytest.raises(DomainError, match="longest is 0"):
        log_spaced_bins(0)


class Largest(TorchDispatchMode):
    """The most elements that any operator returned in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return out


def test_memory_does_not_grow_with_the_stream(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCABULARY, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=4)
    model = LanguageModel(config)
    largest = []
    for length in (300, 3000):
        path = tmp_path / f"{length}.bin"
        np.random.default_rng(0).integers(VOCABULARY, size=length, dtype=np.uint16).tofile(path)
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        with Largest() as seen:
            evaluate_stream(model, tokens, segment_length=100)
            loss_by_position(model, [tokens], segment_length=100, bins=log_spaced_bins(length - 1))
        largest.append(seen.elements)
    assert largest[0] == largest[1] < 100 * 200
