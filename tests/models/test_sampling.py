"""Filters against worked examples, the draw against its distribution, and options refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import ConfigError, DomainError
from resnet_bk.models.sampling import GenerationConfig, draw, keep_top_k, keep_top_p, penalize_repetition, row_seeds

INF = float("inf")
EIGHTHS = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()


def kept(logits):
    return logits[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 2]), (3, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_largest_and_ties_with_the_last(k, expected):
    assert kept(keep_top_k(EIGHTHS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-9, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [0, 1, 2]), (0.875, [0, 1, 2]),
     (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_of_that_mass(p, expected):
    # log then softmax moves 0.5 by less than 1e-7, so the boundaries are probed from the safe side.
    p = p if p in (1e-9, 1.0) else p - 1e-6
    assert kept(keep_top_p(EIGHTHS, p)) == expected


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=30), st.floats(1e-3, 1.0, exclude_max=True))
def test_top_p_is_minimal(values, p):
    logits = torch.tensor([values])
    probabilities = logits.double().softmax(-1)[0]
    inside = keep_top_p(logits, p)[0].isfinite()
    mass = probabilities[inside].sum()
    assert mass >= p - 1e-12
    assert mass - probabilities[inside].min() < p + 1e-12
    assert not (~inside).any() or probabilities[~inside].max() <= probabilities[inside].min()


def test_filters_compose_and_rows_are_independent():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    both = keep_top_p(keep_top_k(logits, 3), 0.999)
    assert both[0].isfinite().tolist() == [False, True, True, True]
    assert torch.equal(both[:1], keep_top_p(keep_top_k(logits[:1], 3), 0.999))
    assert both[1, 0] == 5.0


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0, 0.0]]


def test_draw_inverts_the_cumulative_distribution():
    uniform = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    tokens = draw(EIGHTHS.expand(8, -1), uniform)
    assert tokens.tolist() == [0, 1, 1, 1, 1, 2, 2, 3]


def test_draw_never_takes_an_impossible_token():
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]])
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(3, -1), edges).tolist() == [1, 3, 3]


def test_row_seeds_depend_on_seed_prompt_and_repetition_only():
    a, b = torch.tensor([1, 2]), torch.tensor([3])
    seeds = row_seeds(7, [a, b, a])
    assert len(set(seeds)) == 3
    assert row_seeds(7, [b, a])[::-1] == seeds[:2]
    assert row_seeds(8, [a])[0] != seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", INF), ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0),
     ("top_p", 1.01), ("top_k", -1), ("top_k", 1.5), ("repetition_penalty", 0.0), ("max_new_tokens", 0),
     ("max_length", 1), ("stop_tokens", (-1,)), ("stop_tokens", 5), ("stop_strings", ("",)), ("stop_strings", "end"),
     ("seed", -1), ("max_new_tokens", True)],
)  # fmt: skip
def test_values_outside_their_domain_are_named(field, value):
    with pytest.raises(DomainError, match=rf"generation\.{field} is .*; expected "):
        GenerationConfig(**{field: value})


def test_one_length_limit_must_stand():
    with pytest.raises(DomainError, match="one of them must end the text"):
        GenerationConfig(max_new_tokens=None)


def test_replace_names_the_nearest_option_and_swaps_limits():
    config = GenerationConfig(max_new_tokens=5)
    with pytest.raises(ConfigError, match="Unknown generation option 'temprature'; did you mean 'temperature'"):
        config.replace({"temprature": 1.0})
    assert config.replace({"max_length": 9}) == GenerationConfig(max_new_tokens=None, max_length=9)
    assert config.replace({"max_length": 9, "max_new_tokens": 2}) == GenerationConfig(max_new_tokens=2, max_length=9)
    assert config.replace({"top_k": 3}) == GenerationConfig(max_new_tokens=5, top_k=3)


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(None, 77, 0.7, 40, 0.9, 1.2, (3, 4), ("\n\n",), 5),
        GenerationConfig(stop_tokens=()),
        GenerationConfig(max_length=9),
    ],
)
def test_json_form_round_trips(config):
    assert GenerationConfig.from_dict(config.to_dict()) == config


def test_reads_what_other_libraries_write():
    values = {
        "_from_model_config": True,
        "transformers_version": "5",
        "eos_token_id": 2,
        "do_sample": True,
        "top_k": 50,
    }
    assert GenerationConfig.from_dict(values) == GenerationConfig(temperature=1.0, top_k=50, stop_tokens=(2,))
    assert GenerationConfig.from_dict({"do_sample": False, "temperature": 0.5}).temperature == 0
    with pytest.raises(ConfigError, match="'top_kk'; did you mean 'top_k'"):
        GenerationConfig.from_dict({"top_kk": 1})
    with pytest.raises(ConfigError, match=r"generation\.top_p is 3"):
        GenerationConfig.from_dict({"top_p": 3})
