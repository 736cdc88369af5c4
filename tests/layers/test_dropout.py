"""Dropout of channels and words: what is dropped together, and that means are kept."""

import dataclasses

import torch

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.layers.dropout import locked_dropout, word_dropout

CONFIG = ModelConfig(vocab_size=11, d_model=16, num_layers=1, feed_forward_dim=16, head_dim=16, state_size=8)


def test_a_channel_is_dropped_through_the_whole_sequence_and_not_in_others():
    torch.manual_seed(0)
    found = locked_dropout(torch.ones(64, 5, 32), 0.25)
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((found == 0).float().mean() - 0.25) < 0.03
    assert not torch.equal(found[0], found[1])


def test_a_word_is_dropped_wherever_it_stands():
    torch.manual_seed(0)
    ids = torch.randint(1000, (8, 500))
    found = word_dropout(torch.ones(8, 500, 4), ids, 1000, 0.4)
    kept = found[..., 0] != 0
    assert torch.equal(found, found[..., :1].expand_as(found))
    assert not set(ids[kept].tolist()) & set(ids[~kept].tolist())
    assert abs(len(set(ids[~kept].tolist())) / len(set(ids.flatten().tolist())) - 0.4) < 0.06


def test_probability_zero_changes_nothing_and_draws_nothing():
    x, ids = torch.randn(2, 3, 4), torch.randint(5, (2, 3))
    state = torch.get_rng_state()
    assert locked_dropout(x, 0.0) is x
    assert word_dropout(x, ids, 5, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_drops_in_training_only_and_recomputes_what_it_drew():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, word_dropout=0.3, input_dropout=0.3, output_dropout=0.3)
    model, ids = LanguageModel(config), torch.randint(11, (2, 192))
    plain = LanguageModel(CONFIG)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
    gradients = {}
    for policy in ("none", "block", "segment"):
        model.train().recompute = policy
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, labels=ids).loss.backward()
        gradients[policy] = torch.cat([p.grad.flatten() for p in model.parameters()])
    plain.train()(ids, labels=ids).loss.backward()
    assert not torch.allclose(gradients["none"], torch.cat([p.grad.flatten() for p in plain.parameters()]))
    for policy in ("block", "segment"):
        torch.testing.assert_close(gradients[policy], gradients["none"], rtol=1e-4, atol=1e-6)
