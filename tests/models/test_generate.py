"""Batched generation against the model run on each prompt alone, every prompt form, stopping, seeds and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from resnet_bk.errors import ConfigError, DataError, DomainError, MemoryLimitError, ShapeError
from resnet_bk.models import decode
from resnet_bk.models import generate as generate_module
from resnet_bk.models import prefill as prefill_module
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.generate import GenerationConfig, complete, generate, stream
from resnet_bk.models.prefill import evaluate, memory_needed, prefill
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.tokenizer import Tokenizer

VOCABULARY = 300
LENGTHS = [5, 1, 64, 200, 63, 2, 65, 130]


def make_model(**options) -> LanguageModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, d_model=32, num_layers=2, feed_forward_dim=48, head_dim=16, state_size=16)
    model = LanguageModel(ModelConfig(**sizes, tie_embeddings=False, **options))
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.output_weight.normal_(std=0.3)  # logits of a few units: decisive, not certain
    return model.eval()


def make_prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def text_model():
    """A model with a tokenizer of 256 bytes, the end of text and a few merges."""
    model = make_model()
    model.tokenizer = Tokenizer.train(["ab cd ab cd é → ab"] * 4, vocab_size=270)
    return model


def greedy(model, prompt, count):
    """Tokens by the plain method: the whole sequence again for every token."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@torch.no_grad()
@pytest.mark.parametrize(
    ("segment_tokens", "options"),
    [(64, {}), (100, {}), (8192, {}), (100, {"phase_coupling": True}), (100, {"dynamics": "decay_only"}),
     (100, {"kernel": "green", "boundary": "wall"})],
)  # fmt: skip
def test_every_prompt_gets_the_logits_it_gets_alone(segment_tokens, options):
    model = make_model(**options)
    prompts = make_prompts()
    alone = torch.cat([model(prompt[None]).logits[:, -1] for prompt in prompts])
    model.segment_tokens = segment_tokens
    hidden, state = prefill(model, prompts)
    together = F.linear(hidden, model.output_weight)
    assert (together - alone).abs().max() < 1e-5  # measured 1.2e-6, logits up to 7.5
    token = torch.arange(len(prompts))[:, None]
    decoded = F.linear(evaluate(model, token, state=state)[0][:, 0], model.output_weight)
    longer = torch.cat([model(torch.cat((p, t))[None]).logits[:, -1] for p, t in zip(prompts, token, strict=True)])
    assert (decoded - longer).abs().max() < 1e-5


@torch.no_grad()
def test_greedy_equals_running_the_whole_sequence_again(model):
    prompts = make_prompts([3, 70, 1])
    output = complete(model, prompts, max_new_tokens=8)
    assert output.sequences == [greedy(model, prompt, 8) for prompt in prompts]
    assert output.finish_reasons == ["length"] * 3
    assert output.prompt_lengths == [3, 70, 1]
    assert output.text is None
    for sequence, length, values in zip(output.sequences, output.prompt_lengths, output.log_probabilities, strict=True):
        logits = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        exact = logits[torch.arange(length - 1, len(sequence) - 1), sequence[length:]]
        torch.testing.assert_close(torch.tensor(values), exact, rtol=1e-4, atol=1e-4)


def test_answers_have_the_form_of_the_prompts(model, text_model):
    ids = [prompt.tolist() for prompt in make_prompts([4, 4])]
    long = [generate(model, row, max_new_tokens=3) for row in ids]
    assert [len(row) for row in long] == [7, 7]
    assert long[0][:4] == ids[0]
    assert generate(model, ids, max_new_tokens=3) == long
    tensor = generate(model, torch.tensor(ids), max_new_tokens=3)
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == long
    assert generate(model, torch.tensor(ids, dtype=torch.int32), max_length=7).tolist() == long
    assert generate(model, torch.tensor(ids[1]), max_new_tokens=3).tolist() == long[1]
    assert [row.tolist() for row in generate(model, [torch.tensor(row) for row in ids], max_new_tokens=3)] == long
    text = generate(text_model, "ab cd", max_new_tokens=3)
    assert isinstance(text, str)
    assert text.startswith("ab cd")
    assert generate(text_model, ["ab cd", "ab"], max_new_tokens=3) == [
        text,
        generate(text_model, "ab", max_new_tokens=3),
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(model, side):
    prompts = make_prompts([2, 5, 3])
    padded = torch.full((3, 5), 7)
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(5 - len(prompt), 5) if side == "left" else slice(0, len(prompt))
        padded[row, place], mask[row, place] = prompt, 1
    out = generate(model, padded, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(out[:, :5], padded)
    assert out[:, 5:].tolist() == [generate(model, p, max_new_tokens=4)[len(p) :].tolist() for p in prompts]


def test_max_length_counts_prompt_and_continuation(model):
    output = complete(model, make_prompts([2, 6]), max_length=8)
    assert [len(sequence) for sequence in output.sequences] == [8, 8]
    assert [len(values) for values in output.log_probabilities] == [6, 2]
    both = complete(model, make_prompts([2, 6]), max_length=8, max_new_tokens=3)
    assert [len(sequence) for sequence in both.sequences] == [5, 8]


def test_stop_tokens_end_their_row_only_and_batches_are_filled_up(model):
    prompts = make_prompts([3, 3, 3])
    free = [sequence[3:] for sequence in complete(model, prompts, max_new_tokens=6).sequences]
    stop = next(token for token in free[1][1:3] if token not in free[0] + free[2] + free[1][:1])
    output = complete(model, prompts, max_new_tokens=6, stop_tokens=[stop])
    assert output.finish_reasons == ["length", "stop_token", "length"]
    end = free[1].index(stop) + 1
    assert [sequence[3:] for sequence in output.sequences] == [free[0], free[1][:end], free[2]]
    batch = generate(model, torch.stack(prompts), max_new_tokens=6, stop_tokens=[stop])
    assert batch[1, 3:].tolist() == free[1][:end] + [stop] * (6 - end)


def test_end_of_text_stops_by_default(text_model):
    end = text_model.tokenizer.end_of_text_id
    weight = text_model.output_weight.data
    saved = weight.clone()
    try:
        weight[end] = evaluate(text_model, torch.tensor([text_model.tokenizer.encode("ab")]))[0][0, -1]
        output = complete(text_model, "ab", max_new_tokens=5)
        assert output.finish_reasons == ["stop_token"]
        assert output.sequences[0][-1] == end
        assert output.text == ["ab"]
        assert complete(text_model, "ab", max_new_tokens=5, stop_tokens=()).finish_reasons == ["length"]
    finally:
        weight.copy_(saved)


def scripted(monkeypatch, model, text):
    """Make `model` continue every prompt with the tokens of `text`, whatever its weights say."""
    tokens = iter(model.tokenizer.encode(text))
    monkeypatch.setattr(decode, "choose_tokens", lambda *_: (torch.tensor([next(tokens)]), torch.zeros(1)))


@pytest.mark.parametrize(
    ("stops", "expected", "reason"),
    [
        (["END"], "one E EN ", "stop_string"),
        (["END", "N E"], "one E E", "stop_string"),
        (["ENDURE"], "one E EN END two", "length"),
        (["o END", "two"], "one E EN END ", "stop_string"),
    ],
)
def test_stop_strings_are_cut_even_when_they_arrive_in_pieces(monkeypatch, text_model, stops, expected, reason):
    story = "one E EN END two"
    scripted(monkeypatch, text_model, story)
    count = len(text_model.tokenizer.encode(story))
    steps = list(stream(text_model, "ab", max_new_tokens=count, stop_strings=stops))
    assert "".join(step.text for step in steps) == expected
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + [reason]


def test_streamed_text_never_holds_half_a_character(monkeypatch, text_model):
    story = "é → ü ñ 漢字 🙂!"
    scripted(monkeypatch, text_model, story)
    pieces = [step.text for step in stream(text_model, "ab", max_new_tokens=len(text_model.tokenizer.encode(story)))]
    assert "".join(pieces) == story
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_is_lazy_and_says_what_complete_says(monkeypatch, model):
    prompts = make_prompts([3, 40])
    output = complete(model, prompts, max_new_tokens=5)
    steps = list(stream(model, prompts, max_new_tokens=5))
    for row in (0, 1):
        mine = [step for step in steps if step.row == row]
        assert [step.token for step in mine] == output.sequences[row][output.prompt_lengths[row] :]
        assert [step.log_probability for step in mine] == output.log_probabilities[row]
    calls = []
    monkeypatch.setattr(
        model, "hidden_states", lambda *a, **k: calls.append(a) or LanguageModel.hidden_states(model, *a, **k)
    )
    tokens = stream(model, prompts, max_new_tokens=5)
    assert not calls
    next(tokens)
    assert len(calls) == 1


def test_a_seed_fixes_a_sequence_whatever_the_batch(model):
    prompts = make_prompts([3, 9, 40])
    options = dict(max_new_tokens=12, temperature=1.0, top_k=50, top_p=0.95, seed=3)
    together = complete(model, prompts, **options).sequences
    assert together == [complete(model, prompt, **options).sequences[0] for prompt in prompts]
    assert together == complete(model, prompts[::-1], **options).sequences[::-1]
    assert complete(model, prompts, **{**options, "seed": 4}).sequences != together
    twins = complete(model, [prompts[0]] * 2, **options).sequences
    assert twins[0] == together[0] != twins[1]


def test_without_a_seed_torch_decides(model):
    prompt = make_prompts([3])[0]
    torch.manual_seed(1)
    first = generate(model, prompt, max_new_tokens=12, temperature=1.0)
    second = generate(model, prompt, max_new_tokens=12, temperature=1.0)
    torch.manual_seed(1)
    assert torch.equal(generate(model, prompt, max_new_tokens=12, temperature=1.0), first)
    assert not torch.equal(first, second)


def test_samples_follow_the_model(model):
    prompt = make_prompts([5])[0]
    with torch.no_grad():
        expected = (model(prompt[None]).logits[0, -1] / 1.5).softmax(-1)
    count = 1000
    draws = complete(model, [prompt] * count, max_new_tokens=1, temperature=1.5, seed=0).sequences
    frequency = torch.bincount(torch.tensor([row[-1] for row in draws]), minlength=VOCABULARY) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() <= 5 * error + 1 / count).all()


def test_top_k_one_and_tiny_temperature_are_greedy(model):
    prompt = make_prompts([5])[0]
    best = generate(model, prompt, max_new_tokens=6)
    assert torch.equal(generate(model, prompt, max_new_tokens=6, temperature=2.0, top_k=1), best)
    assert torch.equal(generate(model, prompt, max_new_tokens=6, temperature=1e-30), best)
    assert torch.equal(generate(model, prompt, max_new_tokens=6, temperature=2.0, top_p=1e-9), best)


def test_repetition_penalty_counts_prompt_and_continuation(model):
    prompt = make_prompts([5])[0]
    out = generate(model, prompt, max_new_tokens=40, repetition_penalty=1e6)
    assert len(set(out[4:].tolist())) == 41
    assert not set(out[5:].tolist()) & set(prompt.tolist())
    pair = complete(model, [prompt, make_prompts([9])[0]], max_length=45, repetition_penalty=1e6)
    assert pair.sequences[0] == out.tolist()


def test_training_mode_is_left_as_it_was_and_dropout_is_off():
    model = make_model(dropout=0.5)
    prompt = make_prompts([5])[0]
    expected = generate(model, prompt, max_new_tokens=6)
    model.train()
    model.norm.eval()
    out = generate(model, prompt, max_new_tokens=6)
    assert torch.equal(out, expected)
    assert model.training and model.blocks[0].dropout.training and not model.norm.training
    model(out[None], labels=out[None]).loss.backward()  # the answer is an ordinary tensor


def test_the_folder_s_generation_config_is_the_default(model):
    prompt = make_prompts([5])[0]
    model.generation_config = GenerationConfig(max_new_tokens=2)
    try:
        assert len(generate(model, prompt)) == 7
        assert len(generate(model, prompt, config=GenerationConfig(max_new_tokens=3))) == 8
        assert len(generate(model, prompt, max_length=6)) == 6
    finally:
        model.generation_config = None


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], DomainError, "There is no prompt"),
        ([[1], []], DomainError, "Prompt 1 is empty"),
        (torch.zeros(2, 0, dtype=torch.long), DomainError, "Prompt 0 is empty"),
        ([[1], [2, VOCABULARY]], DomainError, r"Prompt 1 holds token id 300 at position 1; expected ids in \[0, 300\)"),
        ([-1], DomainError, "Prompt 0 holds token id -1 at position 0"),
        ([[1.5]], ShapeError, r"Prompt 0 is \[1.5\]"),
        ([["a", "b"]], ShapeError, "Prompt 0 is"),
        ([[[1]]], ShapeError, "Prompt 0 is"),
        (torch.zeros(1, 2), ShapeError, r"torch.float32 \[1, 2\]; expected integers \[batch, time\]"),
        (torch.zeros(1, 1, 1, dtype=torch.long), ShapeError, "expected integers"),
        ("text", DataError, "the model has no tokenizer"),
    ],
)
def test_bad_prompts_are_refused(model, prompts, error, message):
    with pytest.raises(error, match=message):
        stream(model, prompts)


def test_bad_options_are_refused_before_the_first_token(model):
    with pytest.raises(DomainError, match="Prompt 1 has 5 tokens and max_length is 5"):
        stream(model, make_prompts([2, 5]), max_length=5)
    with pytest.raises(DomainError, match=r"generation\.temperature is -1"):
        stream(model, [1], temperature=-1)
    with pytest.raises(ConfigError, match="'max_tokens'; did you mean"):
        stream(model, [1], max_tokens=3)
    with pytest.raises(DomainError, match=r"stop_tokens holds 300; expected ids in \[0, 300\)"):
        stream(model, [1], stop_tokens=[300])
    with pytest.raises(DataError, match="stop_strings needs text"):
        stream(model, [1], stop_strings=["x"])
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(DomainError, match="attention_mask row 1 has a gap"):
        stream(model, ids, attention_mask=torch.tensor([[0, 1, 1], [1, 0, 1]]))
    with pytest.raises(DomainError, match="other than 0"):
        stream(model, ids, attention_mask=2 * ids)
    with pytest.raises(DomainError, match="Prompt 1 is empty"):
        stream(model, ids, attention_mask=torch.tensor([[0, 1, 1], [0, 0, 0]]))
    with pytest.raises(ShapeError, match=r"attention_mask has shape \[2, 2\]"):
        stream(model, ids, attention_mask=ids[:, :2])
    with pytest.raises(ShapeError, match="attention_mask goes with"):
        stream(model, [1], attention_mask=ids)


def test_damaged_weights_are_reported():
    model = make_model()
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(DomainError, match="logits for prompt 0 are not finite"):
        generate(model, [1, 2])


def test_too_little_memory_is_said_before_anything_runs(monkeypatch, model):
    monkeypatch.setattr(prefill_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(model, "hidden_states", None)
    with pytest.raises(MemoryLimitError, match=r"100 prompts of 500 tokens needs about .* GB .*segment_tokens = 8192"):
        generate(model, make_prompts([5] * 100))


def test_memory_estimate_knows_the_state():
    model = make_model(phase_coupling=True)
    state = evaluate(model, torch.ones(3, 1, dtype=torch.long))[1]
    needed = memory_needed(model.config, [1, 1, 1], 64)
    assert 0.3 * needed["states"] < state.num_bytes < 0.4 * needed["states"]
    assert (
        memory_needed(model.config, [10**6], 64)["one segment"] == memory_needed(model.config, [64], 64)["one segment"]
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status to read the peak from")
def test_a_long_prompt_takes_the_memory_of_a_segment_and_no_more_than_estimated():
    program = """
import re, torch
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.generate import generate
from resnet_bk.models.prefill import memory_needed
from resnet_bk.models.resnet_bk import LanguageModel
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
model = LanguageModel(ModelConfig.preset("small", num_layers=2))
model.segment_tokens = 2048
generate(model, [1] * 64, max_new_tokens=2)
before = peak()
generate(model, torch.ones(2048, dtype=torch.long), max_new_tokens=2)
short = peak() - before
generate(model, torch.ones(16384, dtype=torch.long), max_new_tokens=2)
print(short, peak() - before, sum(memory_needed(model.config, [16384], 2048).values()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    short, long, estimated = map(int, done.stdout.split())
    assert long < 1.5 * short  # 8 times the tokens; measured 1.2
    assert long < estimated < 4 * long


class InPlaceDecoder(decode.Decoder):
    """The decoder of a GPU without its graph: in place, and ahead of the reader."""

    def _replay(self):
        return self._advance()


@pytest.mark.parametrize("source", ["gated", "free", "unit"])
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=5)])
def test_decoding_in_place_and_ahead_says_the_same(monkeypatch, source, options):
    model = make_model(source=source)
    prompts = make_prompts([3, 70, 1, 12, 5, 9])
    free = complete(model, prompts, max_new_tokens=12, **options).sequences
    # Rows end at different places: some by a stop token, all by their total length.
    settings = dict(options, max_length=75, max_new_tokens=30, stop_tokens=[free[0][6], free[3][14], free[5][20]])
    expected = complete(model, prompts, **settings)
    assert len({len(ids) - n for ids, n in zip(expected.sequences, expected.prompt_lengths, strict=True)}) >= 4
    monkeypatch.setattr(decode, "captures", lambda _: True)
    monkeypatch.setattr(generate_module, "Decoder", InPlaceDecoder)
    ours = complete(model, prompts, **settings)
    assert ours.sequences == expected.sequences
    assert ours.finish_reasons == expected.finish_reasons
    for mine, theirs in zip(ours.log_probabilities, expected.log_probabilities, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_state_of_one_s_own_is_overwritten_and_equals_the_prefill(model):
    ids = make_prompts([40])[0][None].repeat(2, 1)
    state = decode.owned(evaluate(model, ids[:, :30])[1])
    kept = [layer.mix.memory.data_ptr() for layer in state.layers]
    for t in range(30, 40):
        _, after = evaluate(model, ids[:, t : t + 1], state=state)
        state.layers[0].mix.position.add_(1)
        assert [layer.mix.memory.data_ptr() for layer in after.layers] == kept
    whole = evaluate(model, ids)[1]
    for ours, theirs in zip(state.layers, whole.layers, strict=True):
        assert torch.equal(ours.mix.position, theirs.mix.position)
        torch.testing.assert_close(ours.mix.memory, theirs.mix.memory, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tuple(ours.green), tuple(theirs.green), rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="A step takes one token"):
        evaluate(model, ids, state=state)


def test_half_of_the_rows_have_to_end_before_a_graph_is_given_up(monkeypatch, model):
    monkeypatch.setattr(decode, "captures", lambda _: True)
    hidden, state = prefill(model, make_prompts([2] * 6))
    decoder = decode.Decoder(model, hidden, state, GenerationConfig(temperature=0.0))
    assert not decoder.keep([0, 1, 2, 3, 4, 5])
    assert not decoder.keep([0, 2, 3, 5])
    assert decoder.keep([0, 3, 5])
    assert decoder.state.layers[0].mix.memory.shape[0] == 3
    positions = {layer.mix.position.data_ptr() for layer in decoder.state.layers}
    assert len(positions) == 1
