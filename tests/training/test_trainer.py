from __future__ import annotations

import json
import math

import pytest
import torch

from resnet_bk import Tokenizer, Trainer
from resnet_bk.errors import CheckpointError, ConfigError, DataError, DomainError
from resnet_bk.evaluation.perplexity import evaluate_stream
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.schedules import learning_rate_at


def read_rows(trainer: Trainer, kind: str) -> list[dict]:
    lines = (trainer.output_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


class ListLoader:
    """The given batches, once."""

    def __init__(self, *batches) -> None:
        self.batches = list(batches)

    def __next__(self):
        if not self.batches:
            raise StopIteration
        return self.batches.pop(0)

    def state_dict(self):
        return {}

    def load_state_dict(self, state) -> None:
        pass


class Recorder(Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list = []
        self.stop_at = stop_at

    def on_train_start(self, trainer):
        self.calls.append("start")

    def on_step_end(self, trainer):
        self.calls.append(trainer.step)
        if trainer.step == self.stop_at:
            trainer.stop()

    def on_evaluate(self, trainer, evaluation):
        self.calls.append("evaluate")

    def on_checkpoint(self, trainer, folder):
        self.calls.append(folder.name)

    def on_train_end(self, trainer):
        self.calls.append("end")


def test_a_run_learns_and_logs(tiny):
    config = tiny.config(steps=60, learning_rate=2e-2, log_every=10, evaluate_every=20)
    model = tiny.model()
    trainer = Trainer(model, tiny.loader(), config, validation=tiny.validation, progress=False)
    before = trainer.evaluate().loss
    result = trainer.train()
    assert result.step == 60 and result.tokens == 60 * 32
    assert result.checkpoint == trainer.output_dir / "step-000060"
    assert result.validation.loss < before - 0.5
    assert result.validation == evaluate_stream(model, tiny.validation, segment_length=32)

    train = read_rows(trainer, "train")
    assert [row["step"] for row in train] == [10, 20, 30, 40, 50, 60]
    assert [row["tokens"] for row in train] == [320 * k for k in range(1, 7)]
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert [row["learning_rate"] for row in train] == [learning_rate_at(10 * k - 1, config) for k in range(1, 7)]
    assert all(row["gradient_norm"] > 0 and row["tokens_per_second"] > 0 for row in train)
    validation = read_rows(trainer, "validation")
    assert [row["step"] for row in validation] == [20, 40, 60]
    assert validation[-1]["loss"] == result.validation.loss
    assert validation[-1]["perplexity"] == result.validation.perplexity
    assert validation[-1]["bits_per_byte"] is None and validation[-1]["evaluated_tokens"] == 199


def test_rows_average_over_their_interval(tiny):
    each = Trainer(tiny.model(), tiny.loader(), tiny.config(), progress=False)
    each.train()
    losses = [row["loss"] for row in read_rows(each, "train")]
    folder = str(each.output_dir.with_name("other"))
    some = Trainer(tiny.model(), tiny.loader(), tiny.config(log_every=4, output_dir=folder), progress=False)
    some.train()
    # Rows at step 4 and at the end; every batch has the same number of targets.
    expected = [sum(losses[:4]) / 4, sum(losses[4:]) / 2]
    assert [row["loss"] for row in read_rows(some, "train")] == pytest.approx(expected, rel=1e-12)


def test_bits_per_byte_counts_the_text_of_the_predicted_tokens(tiny):
    tokenizer = Tokenizer.train(["aa ab ba bb " * 20], vocab_size=260)
    tokens = torch.tensor(tokenizer.encode("ab ba ab bb aa " * 8))
    model = tiny.model(vocab_size=260)
    config = tiny.config(evaluation_tokens=30)
    trainer = Trainer(model, tiny.loader(), config, validation=tokens, tokenizer=tokenizer, progress=False)
    found = trainer.evaluate()
    assert found.tokens == 29
    assert found.text_bytes == len(tokenizer.decode(tokens[:30].tolist())) - len(tokenizer.decode(tokens[:1].tolist()))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.text_bytes)


def masked_batches() -> list[dict[str, torch.Tensor]]:
    """Four rows with very different numbers of targets, in two batches."""
    ids = torch.randint(13, (4, 16), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, 3:] = -100
    labels[1, :] = -100
    return [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]


def gradients(tiny, name: str, batches, **fields) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of one optimizer step in float64, and its loss."""
    config = tiny.config(steps=1, gradient_clip_norm=0, output_dir=tiny.config().output_dir + name, **fields)
    model = tiny.model().double()
    trainer = Trainer(model, ListLoader(*batches), config, progress=False)
    trainer.train()
    return {n: p.grad for n, p in model.named_parameters()}, read_rows(trainer, "train")[0]["loss"]


def test_accumulation_equals_one_larger_batch(tiny):
    parts = masked_batches()
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected, loss = gradients(tiny, "a", [whole])
    found, accumulated_loss = gradients(tiny, "b", parts, gradient_accumulation_steps=2)
    assert accumulated_loss == pytest.approx(loss, rel=1e-14)
    for name, gradient in expected.items():
        # Measured worst: 2e-16, on gradients up to 1.2.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-14)


def test_packed_documents_accumulate_like_separate_ones(tiny):
    ids = torch.randint(13, (1, 20), generator=torch.Generator().manual_seed(6))
    packed = {"input_ids": ids, "cu_seqlens": torch.tensor([0, 5, 6, 20], dtype=torch.int32)}
    separate = [{"input_ids": ids[:, :5]}, {"input_ids": ids[:, 5:6]}, {"input_ids": ids[:, 6:]}]
    expected, loss = gradients(tiny, "a", [packed])
    found, separate_loss = gradients(tiny, "b", separate, gradient_accumulation_steps=3)
    assert separate_loss == pytest.approx(loss, rel=1e-14)
    for name, gradient in expected.items():
        # Measured worst: 7e-16, on gradients up to 0.9.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-14)


def test_clipping_bounds_the_gradient_and_logs_it_unclipped(tiny):
    model = tiny.model()
    trainer = Trainer(model, tiny.loader(), tiny.config(steps=1, gradient_clip_norm=1e-3), progress=False)
    trainer.train()
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)
    assert read_rows(trainer, "train")[0]["gradient_norm"] > 0.05


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_precision_keeps_float32_parameters(tiny, precision):
    config = tiny.config(steps=40, learning_rate=2e-2, precision=precision)
    model = tiny.model()
    trainer = Trainer(model, tiny.loader(), config, validation=tiny.validation, progress=False)
    before = trainer.evaluate().loss
    result = trainer.train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {t.dtype for state in trainer.optimizer.state.values() for t in state.values()} == {torch.float32}
    assert result.validation.loss < before - 0.3
    assert trainer.scaler.is_enabled() == (precision == "float16")


def poison(parameter: torch.nn.Parameter, steps: set[int], trainer: Trainer, value: float = math.inf) -> None:
    """Make one gradient element `value` in the given steps (counted from 1)."""

    def hook(gradient):
        if trainer.step + 1 in steps:
            gradient = gradient.clone()
            gradient.view(-1)[-1] = value
        return gradient

    parameter.register_hook(hook)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradient_that_is_not_finite_stops_the_run(tiny, value):
    model = tiny.model()
    recorder = Recorder()
    config = tiny.config(checkpoint_every=1, asynchronous_checkpoints=False)
    trainer = Trainer(model, tiny.loader(), config, callbacks=[recorder], progress=False)
    name, parameter = list(model.named_parameters())[3]
    poison(parameter, {3}, trainer, value)
    with pytest.raises(
        DomainError, match=rf"Training step 3: the norm .* {value}.* gradient is not finite is {name}\."
    ):
        trainer.train()
    assert recorder.calls == ["start", 1, "step-000001", 2, "step-000002", "end"]
    saved = type(model).from_pretrained(trainer.output_dir / "step-000002").state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())


def test_loss_that_is_not_finite_names_the_broken_parameter(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    trainer = Trainer(model, tiny.loader(), tiny.config(), progress=False)
    with pytest.raises(DomainError, match=r"Training step 1: the loss is nan; .* value is not finite is norm.weight\."):
        trainer.train()
    assert not list(trainer.output_dir.glob("step-*"))


def test_float16_overflow_is_counted_and_changes_nothing(tiny):
    model = tiny.model()
    trainer = Trainer(model, tiny.loader(), tiny.config(steps=3, precision="float16"), progress=False)
    poison(model.norm.weight, {1}, trainer)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    unchanged = []

    class Compare(Callback):
        def on_step_end(self, trainer):
            unchanged.append(all(torch.equal(p, start[name]) for name, p in model.named_parameters()))

    trainer.add_callback(Compare())
    trainer.train()
    assert unchanged == [True, False, False]
    rows = read_rows(trainer, "train")
    assert [row["overflow_steps"] for row in rows] == [1, 1, 1]
    assert [row["gradient_scale"] for row in rows] == [32768.0] * 3
    assert rows[0]["gradient_norm"] is None and rows[1]["gradient_norm"] > 0


def test_float16_overflow_without_end_is_an_error(tiny):
    model = tiny.model()
    trainer = Trainer(model, tiny.loader(), tiny.config(steps=50, precision="float16"), progress=False)
    poison(model.norm.weight, set(range(51)), trainer)
    with pytest.raises(DomainError, match=r"Training step 17: the norm .* gradient is not finite is norm.weight"):
        trainer.train()


def test_hooks_come_in_order(tiny):
    recorder = Recorder()
    trainer = Trainer(
        tiny.model(), tiny.loader(),
        tiny.config(steps=3, evaluate_every=2, checkpoint_every=2, asynchronous_checkpoints=False),
        validation=tiny.validation, callbacks=[recorder], progress=False,
    )  # fmt: skip
    trainer.train()
    assert recorder.calls == ["start", 1, "evaluate", 2, "step-000002", "evaluate", 3, "step-000003", "end"]


def test_stop_saves_and_train_continues(tiny):
    whole = tiny.model()
    options = dict(log_every=3)
    folder = tiny.config().output_dir + "whole"
    reference = Trainer(whole, tiny.loader(), tiny.config(output_dir=folder, **options), progress=False)
    reference.train()
    model = tiny.model()
    recorder = Recorder(stop_at=2)
    trainer = Trainer(model, tiny.loader(), tiny.config(**options), callbacks=[recorder], progress=False)
    assert trainer.train().checkpoint.name == "step-000002"
    assert trainer.train().step == 6
    assert recorder.calls == ["start", 1, 2, "step-000002", "end", "start", 3, 4, 5, 6, "step-000006", "end"]
    # Stopping between two rows changes neither.
    assert [row["loss"] for row in read_rows(trainer, "train")] == [
        row["loss"] for row in read_rows(reference, "train")
    ]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_folder_with_a_run_is_not_overwritten(tiny):
    Trainer(tiny.model(), tiny.loader(), tiny.config(), progress=False).train()
    trainer = Trainer(tiny.model(), tiny.loader(), tiny.config(), progress=False)
    before = (trainer.output_dir / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"holds a run already .*step-000006.*training.resume"):
        trainer.train()
    assert (trainer.output_dir / "metrics.jsonl").read_text() == before


def test_resume_without_a_checkpoint_starts_and_says_so(tiny, capsys):
    trainer = Trainer(tiny.model(), tiny.loader(), tiny.config(resume=True, log_every=6))
    trainer.train()
    output = capsys.readouterr().out
    assert "No checkpoint in" in output and "step 6/6  loss" in output


def test_data_that_ends_is_an_error(tiny):
    trainer = Trainer(tiny.model(), ListLoader(next(tiny.loader())), tiny.config(), progress=False)
    with pytest.raises(DataError, match="ended before step 2 of 6"):
        trainer.train()


def test_step_without_targets_is_an_error(tiny):
    batch = next(tiny.loader())
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    with pytest.raises(DataError, match="Training step 1 has no token to predict"):
        Trainer(tiny.model(), ListLoader(batch), tiny.config(), progress=False).train()


def test_narrow_parameters_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"is torch.bfloat16; training keeps float32 parameters"):
        Trainer(tiny.model().bfloat16(), tiny.loader(), tiny.config())


def test_evaluation_needs_tokens(tiny):
    with pytest.raises(DataError, match="no validation tokens"):
        Trainer(tiny.model(), tiny.loader(), tiny.config()).evaluate()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "float16", "float32"])
def test_a_gpu_run_learns_and_resumes(tiny, precision):
    options = dict(device="cuda", precision=precision, schedule="constant", learning_rate=2e-2)
    config = tiny.config(steps=20, **options)
    first = Trainer(tiny.model(), tiny.loader(), config, validation=tiny.validation, progress=False)
    before = first.evaluate().loss
    first.train()
    model = tiny.model()
    config = tiny.config(steps=60, resume=True, **options)
    second = Trainer(model, tiny.loader(), config, validation=tiny.validation, progress=False)
    assert second.train().validation.loss < before - 0.3
    assert [row["step"] for row in read_rows(second, "train")] == list(range(1, 61))
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cuda")}
    state = json.loads((second.output_dir / "step-000060" / "trainer_state.json").read_text())
    assert state["random"]["cuda"] and bool(state["scaler"]) == (precision == "float16")
