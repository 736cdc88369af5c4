"""State carried from batch to batch: whose gradients are whose, exact resumption, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from resnet_bk import LanguageModel, ModelConfig, Trainer
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.data.streams import DocumentLoader, StreamLoader
from resnet_bk.errors import CheckpointError, ConfigError, InstabilityError
from resnet_bk.evaluation.perplexity import evaluate_stream
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.carry import Carry
from resnet_bk.training.curriculum import CurriculumLoader, training_batches
from resnet_bk.training.stability.recovery import AutoRecovery

TOKENS = TokenDataset.from_ids("train", np.random.default_rng(0).integers(0, 2, 600).cumsum() % 13)
KINDS = {
    "resolvent": {},
    "phases": {"phase_coupling": True, "peierls_pairs": 1, "source": "free"},
    "wall": {"boundary": "wall", "sites_per_token": 3},
    "decay-only": {"dynamics": "decay_only"},
    "primes": {"position_potential": "prime_bump"},
    "plain-keys": {"key_shift": False, "rotary_fraction": 1.0},
    "mamba2": {"mixer": "mamba2"},
    "mamba3": {"mixer": "mamba3"},
    "window": {"mixer": "attention", "attention_window": 6, "attention_head_dim": 8},
    "hybrid": {"attention_every": 2, "attention_window": 30, "attention_head_dim": 8},
}


def streams(tiny, **fields) -> Trainer:
    """A trainer on streams of `TOKENS`, of four segments each unless told otherwise."""
    model = fields.pop("model", None)
    callbacks = fields.pop("callbacks", ())
    config = tiny.config(**{"stream_length": 64, "carry": "truncated", **fields})
    model = tiny.model() if model is None else model
    return Trainer(model, training_batches(TOKENS, config), config, callbacks=callbacks, progress=False)


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def one_step(tiny, model: LanguageModel, **fields) -> dict[str, torch.Tensor]:
    """Gradients of one step over four segments of two streams."""
    options = dict(steps=1, gradient_accumulation_steps=4, gradient_clip_norm=0)
    streams(tiny, model=model, **{**options, **fields}).train()
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_gradients_are_those_of_whole_sequences(tiny, kind):
    model, whole = tiny.model(**KINDS[kind]).double(), tiny.model(**KINDS[kind]).double()
    found = one_step(tiny, model, carry="exact")
    ids = next(TokenLoader(TOKENS, 64, 2)).input_ids
    whole(ids, labels=ids).loss.backward()
    expected = gradients(whole)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Measured worst: 3e-15, on gradients up to 1.2.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_gradients_are_those_of_the_long_run_with_detached_states(tiny, kind):
    model, long = tiny.model(**KINDS[kind]).double(), tiny.model(**KINDS[kind]).double()
    found = one_step(tiny, model)
    ids = next(TokenLoader(TOKENS, 64, 2)).input_ids
    state, exact = None, tiny.model(**KINDS[kind]).double()
    exact(ids, labels=ids).loss.backward()
    for start in range(0, 64, 16):
        output = long(ids[:, start : start + 16], labels=ids[:, start : start + 17], state=state)
        (output.loss * (15 + (start < 48)) / 63).backward()
        state = output.state.detach()
    for name, gradient in gradients(long).items():
        # Measured worst: 0.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-14, msg=name)
    # The two kinds of gradient are two.
    assert any((found[name] - gradient).abs().max() > 1e-6 for name, gradient in gradients(exact).items())


class Losses(Callback):
    """What the rows of metrics say, as sums over the targets of their step."""

    def __init__(self) -> None:
        self.nats: list[float] = []

    def on_gradients(self, trainer, loss, gradient_norm) -> None:
        self.nats.append(loss)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_of_a_stream_are_those_of_streaming_evaluation(tiny, accumulation):
    """At a rate that changes nothing, training reads a text as evaluation does: each token from all before it."""
    model, losses = tiny.model().double(), Losses()
    streams(
        tiny, model=model, callbacks=[losses], steps=36 // accumulation, batch_size=1, stream_length=576,
        gradient_accumulation_steps=accumulation, learning_rate=1e-30,
    ).train()  # fmt: skip
    text = next(TokenLoader(TOKENS, 576, 1)).input_ids[0]
    targets = [16 * accumulation] * len(losses.nats)
    targets[-1] -= 1  # of the last token
    nats = sum(loss * count for loss, count in zip(losses.nats, targets, strict=True))
    assert nats == pytest.approx(evaluate_stream(model, text, segment_length=100).nats, rel=1e-13)


@pytest.mark.parametrize("kind", ["phases", "resolvent", "mamba2", "mamba3", "window", "hybrid"])
def test_a_run_stopped_inside_a_stream_resumes_bit_identically(tiny, tmp_path, kind):
    def run(folder: str, *parts: int) -> Trainer:
        for steps in parts:
            trainer = streams(
                tiny, model=tiny.model(**KINDS[kind]), output_dir=str(tmp_path / folder), steps=steps, resume=True,
                schedule="constant", carry="exact", gradient_accumulation_steps=2, stream_length=128,
            )  # fmt: skip
            trainer.train()
        return trainer

    whole, parts = run("whole", 6), run("parts", 1, 3, 6)  # streams end at steps 4 and 8
    folders = [trainer.output_dir / "step-000006" for trainer in (whole, parts)]
    for name in ("model.safetensors", "optimizer/model.safetensors", "carried/state.safetensors"):
        left, right = (load_file(folder / name) for folder in folders)
        assert left.keys() == right.keys() and left
        assert [key for key in left if not torch.equal(left[key], right[key])] == []
    # A restored state is not an empty one.
    moved = tmp_path / "parts" / "step-000003" / "carried" / "state.safetensors"
    assert any((tensor != 0).any() for tensor in load_file(moved).values())


def test_streams_begin_afresh_where_the_last_ended(tiny):
    seen = []

    class Watch(Callback):
        def on_train_start(self, trainer):
            forward = trainer.engine.loss
            trainer.engine.loss = lambda part, weight, state: seen.append(state) or forward(part, weight, state)

    streams(tiny, callbacks=[Watch()], steps=9, stream_length=48).train()
    assert [state is None for state in seen] == [True, False, False] * 3
    assert all(not tensor.requires_grad for state in seen if state is not None for tensor in state.tensors)
    assert {int(state.layers[0].mix.position[0]) for state in seen if state is not None} == {16, 32}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_start_anew_are_as_if_they_were_the_first(tiny, kind):
    model = tiny.model(**KINDS[kind]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    ids = torch.randint(13, (3, 26), generator=torch.Generator().manual_seed(1))
    before = model(ids[:, :10]).state.detach()

    def run(rows: list[int], state) -> torch.Tensor:
        output = model(ids[rows, 10:], labels=ids[rows, 10:], state=state, return_logits=True)
        (output.loss * len(rows) / 3).backward()
        return output.logits.detach()

    found = run([0, 1, 2], model.restarted(before, torch.tensor([True, False, True])))
    gradient = {name: value.clone() for name, value in gradients(model).items()}
    model.zero_grad()
    # Measured worst: 4e-16 on logits up to 1.6, 1e-15 on gradients up to 1.0.
    torch.testing.assert_close(found[[0, 2]], run([0, 2], before.select(torch.tensor([0, 2]))), rtol=0, atol=1e-13)
    torch.testing.assert_close(found[[1]], run([1], None), rtol=0, atol=1e-13)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(gradient[name], expected, rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["resolvent", "mamba2", "mamba3", "hybrid"])
def test_rows_start_anew_in_float32_at_a_size_that_kernels_take(kind, device):
    """Rows at different positions, of which one starts anew, have the losses and gradients of rows alone."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=128, num_layers=2, feed_forward_dim=128, head_dim=64, state_size=64)
    options = {"attention_head_dim": 64} if kind == "hybrid" else {}
    model = LanguageModel(ModelConfig(**{**sizes, **KINDS[kind], **options})).to(device)
    ids = torch.randint(64, (3, 200), generator=torch.Generator().manual_seed(1)).to(device)
    first = model(ids[:, :70]).state.detach()
    before = model(ids[:, 70:100], state=model.restarted(first, torch.tensor([True, True, False], device=device)))

    def run(rows: list[int], state) -> torch.Tensor:
        loss = model(ids[rows, 100:], labels=ids[rows, 100:], state=state).loss
        (loss * len(rows) / 3).backward()
        return loss.detach()

    state = before.state.detach()
    found = run([0, 1, 2], model.restarted(state, torch.tensor([True, False, True], device=device)))
    gradient = {name: value.clone() for name, value in gradients(model).items()}
    model.zero_grad()
    expected = run([1], None)
    for row in (0, 2):
        expected += run([row], state.select(torch.tensor([row], device=device)))
    torch.testing.assert_close(found, expected / 3, rtol=1e-5, atol=0)
    largest = max(value.abs().max().item() for value in gradients(model).values())
    for name, value in gradients(model).items():
        # Measured worst on a CPU: 6e-7 of the largest gradient. On a GPU products round to TF32, whose step is 2^-11.
        tolerance = 2e-3 if device == "cuda" else 1e-5
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=tolerance * largest, msg=name)


DOCUMENTS = replace(TOKENS, document_offsets=np.array([0, 90, 120, 155, 156, 300, 460, 600]))


def on_documents(tiny, **fields) -> Trainer:
    """A trainer that reads `DOCUMENTS` whole, three rows at a time."""
    model = fields.pop("model", None)
    config = tiny.config(**{"carry": "truncated", "stream": "document", "batch_size": 3, **fields})
    model = tiny.model() if model is None else model
    return Trainer(model, training_batches(DOCUMENTS, config), config, progress=False)


@pytest.mark.parametrize("carry", ["truncated", "exact"])
@pytest.mark.parametrize("kind", ["resolvent", "mamba2", "window"])
def test_documents_are_read_as_if_each_were_alone(tiny, kind, carry):
    model, alone = tiny.model(**KINDS[kind]).double(), tiny.model(**KINDS[kind]).double()
    on_documents(tiny, model=model, carry=carry, steps=1, gradient_accumulation_steps=9, gradient_clip_norm=0).train()
    batches = DocumentLoader(DOCUMENTS, 16, 3)
    total, count, states = torch.zeros(()), 0, [None] * 3
    for batch in (next(batches) for _ in range(9)):
        for row in range(3):
            targets = int((batch.labels[row, 1:] != -100).sum())
            state = states[row] if batch.continues[row] else None
            state = None if state is None else state if carry == "exact" else state.detach()
            if targets:
                output = alone(batch.input_ids[row : row + 1], labels=batch.labels[row : row + 1], state=state)
                total, count, states[row] = total + output.loss * targets, count + targets, output.state
    (total / count).backward()
    found = gradients(model)
    for name, gradient in gradients(alone).items():
        # Measured worst: 2e-16, on gradients up to 0.3.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-13, msg=name)


def test_a_run_stopped_inside_documents_resumes_bit_identically(tiny, tmp_path):
    def run(folder: str, *parts: int) -> Trainer:
        for steps in parts:
            trainer = on_documents(
                tiny, output_dir=str(tmp_path / folder), steps=steps, resume=True, schedule="constant"
            )
            trainer.train()
        return trainer

    whole, parts = run("whole", 12), run("parts", 2, 7, 12)
    found, expected = (trainer.model.state_dict() for trainer in (parts, whole))
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    states = [trainer.carry.state.tensors for trainer in (parts, whole)]
    assert all(torch.equal(left, right) for left, right in zip(*states, strict=True))


class GapLoader:
    """Streams with one segment left out; what follows does not continue."""

    def __init__(self, loader: StreamLoader, gap: int) -> None:
        self.loader, self.gap, self.drawn = loader, gap, 0

    def __next__(self):
        self.drawn += 1
        if self.drawn != self.gap:
            return next(self.loader)
        next(self.loader)
        return next(self.loader)._replace(continues=torch.zeros(2, dtype=torch.bool))

    def state_dict(self):
        return {}


class Refuse(Callback):
    """Refuses the step at which it comes to a certain batch, once it is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_gradients(self, trainer, loss, gradient_norm):
        if trainer.step + 1 == self.step:
            self.step = 0
            raise InstabilityError("refused")


def test_a_rollback_takes_the_state_back_and_a_gap_ends_the_streams(tiny, tmp_path):
    recovery = AutoRecovery(learning_rate_factor=1, snapshot_every=2)
    recovered = streams(tiny, callbacks=[recovery, Refuse(4)], steps=6, stream_length=128)
    recovered.train()
    config = tiny.config(output_dir=str(tmp_path / "gap"), steps=6, carry="truncated", stream_length=128)
    loader = GapLoader(StreamLoader(TOKENS, 16, 2, stream_length=128), gap=4)
    expected = Trainer(tiny.model(), loader, config, progress=False)
    expected.train()
    found, wanted = recovered.model.state_dict(), expected.model.state_dict()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
    assert torch.equal(recovered.carry.state.layers[0].mix.memory, expected.carry.state.layers[0].mix.memory)


def test_stages_carry_streams_of_their_own(tiny):
    trainer = streams(tiny, steps=8, curriculum=[[3, 8, 4]], stream_length=0)
    assert isinstance(trainer.train_loader, CurriculumLoader)
    starts = []

    class Watch(Callback):
        def on_step_end(self, trainer):
            starts.append(int(trainer.carry.state.layers[0].mix.position[0]))

    trainer.add_callback(Watch())
    trainer.train()
    assert starts == [8, 16, 24, 16, 32, 48, 64, 80]


def test_damage_and_other_models_are_named(tiny, tmp_path):
    trainer = streams(tiny, steps=2)
    trainer.train()
    folder = trainer.output_dir / "step-000002"
    with pytest.raises(CheckpointError, match=r"state\.safetensors and the state of this model differ in 'layers\.0\."):
        streams(tiny, model=tiny.model(**KINDS["mamba3"])).carry.load(folder)
    path = folder / "carried" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"carried/state\.safetensors cannot be read"):
        trainer.carry.load(folder)
    with pytest.raises(CheckpointError, match=r"carried/state\.safetensors"):
        streams(tiny, steps=4, resume=True).train()


def test_settings_that_cannot_work_are_refused(tiny):
    for fields, message in (
        ({"carry": "some"}, r"training\.carry is 'some'"),
        ({"stream_length": 64}, r"training\.stream_length is 64, but training\.carry is 'none'"),
        ({"carry": "truncated", "stream_length": 40}, r"expected 0 or a multiple of training\.sequence_length, 16"),
        ({"carry": "exact"}, "with one batch a step"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.config(**fields)
    with pytest.raises(ConfigError, match=r"training\.carry is 'truncated', but attention without a window"):
        streams(tiny, model=tiny.model(attention_every=2, attention_head_dim=8))
    for fields, message in (
        ({"stream": "line"}, r"training\.stream is 'line'; expected window or document"),
        ({"stream": "document"}, r"training\.stream is 'document', but training\.carry is 'none'"),
        ({"carry": "truncated", "stream": "document", "stream_length": 32}, "which is as long as it is"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.config(**fields)
    engine = SimpleNamespace(sharded=True, context=None, ranks=SimpleNamespace(rank=0, size=1))
    with pytest.raises(ConfigError, match=r"distributed\.strategy is 'fsdp', with which rows cannot start anew"):
        Carry(tiny.config(carry="truncated", stream="document"), tiny.model(), engine)
    with pytest.raises(ConfigError, match=r"distributed\.strategy is 'fsdp', with which rows cannot start anew"):
        carry = Carry(tiny.config(carry="truncated"), tiny.model(), engine)
        carry.begin_step([{"continues": torch.tensor([True, False])}])
    engine = SimpleNamespace(sharded=False, context=object(), ranks=engine.ranks)
    with pytest.raises(ConfigError, match=r"training\.carry is 'exact', but ranks that share sequences"):
        Carry(tiny.config(carry="exact", gradient_accumulation_steps=2), tiny.model(), engine)
    config = tiny.config(carry="truncated")
    packed = {"continues": torch.tensor([True]), "cu_seqlens": torch.tensor([0, 16])}
    for batch in (next(tiny.loader()), {**next(tiny.loader()), **packed}):
        with pytest.raises(ConfigError, match="needs batches of whole rows with a field `continues`"):
            Trainer(tiny.model(), iter([batch]), config, progress=False)._train_step()
