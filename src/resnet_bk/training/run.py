"""A whole training run from one `RunConfig`: corpus, tokenizer, model, training, baselines, loss curve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from resnet_bk.data.prepare import PreparedCorpus, prepare_corpus
from resnet_bk.evaluation.baselines import token_counts, unigram_bits_per_byte, xz_bits_per_byte
from resnet_bk.evaluation.plots import plot_loss_curve
from resnet_bk.models.adapters import load_base
from resnet_bk.models.checkpoint import locate
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.callbacks import METRICS_FILE, Callback
from resnet_bk.training.config import RunConfig
from resnet_bk.training.curriculum import training_batches
from resnet_bk.training.random_state import seed_everything
from resnet_bk.training.ranks import join_ranks
from resnet_bk.training.stability.callbacks import stability_callbacks
from resnet_bk.training.time_budget import TimeBudget
from resnet_bk.training.trainer import Trainer, TrainingResult

CURVE_FILE = "loss.png"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves in memory; checkpoints, metrics and the loss curve are in `training.output_dir`."""

    training: TrainingResult
    model: LanguageModel
    """Trained, in evaluation mode, with its tokenizer."""
    corpus: PreparedCorpus
    baselines: dict[str, float]
    """Bits per byte of the evaluated text; see `validation_baselines`."""
    loss_curve: Path
    """PNG of losses and baselines against tokens."""
    is_main: bool
    """Whether this is rank 0; where a model is sharded, the others hold one without storage."""


def train_run(config: RunConfig, *, callbacks: Iterable[Callback] = (), progress: bool = True) -> RunResult:
    """The result of training `config.model` on `config.data` as `config.training` says.

    With `config.adapters.base`, adapters of that model are trained, on its own tokens unless `data.tokenizer` is set.
    The same configuration on the same machine gives the same parameters, whether or not the run was interrupted.

    Args:
        config: everything that is chosen.
        callbacks: passed to the `Trainer`.
        progress: print baselines and progress.

    Raises:
        ConfigError, DataError, CheckpointError, BackendError, DomainError: as `prepare_corpus`, `load_base` and
            `Trainer` do.
    """
    training = config.training
    # First, because preparing the corpus takes of the budget too.
    limit = training.time_budget_seconds
    budget = TimeBudget(limit or None, reserve_seconds=min(30.0, limit / 10))
    # A device that is not there should be known before the corpus is prepared, which may take long.
    ranks = join_ranks(
        training.device,
        timeout_seconds=config.distributed.timeout_seconds,
        alone=config.distributed.strategy == "fsdp",
    )
    data = config.data
    if config.adapters.base and data.tokenizer is None:
        data = replace(data, tokenizer=str(locate(config.adapters.base)))
    corpus = ranks.main_first(lambda: prepare_corpus(data, config.model.vocab_size))
    if config.adapters.base:
        seed_everything(training.seed)
        model = load_base(LanguageModel, config.adapters, config=config.model, device=ranks.device)
    else:
        with torch.device("meta"):  # filled by the trainer, so that no rank need hold all of it
            model = LanguageModel(config.model)
    trainer = Trainer(
        model,
        training_batches(corpus.train, training),
        training,
        distributed=config.distributed,
        validation=corpus.validation.tokens,
        tokenizer=corpus.tokenizer,
        data_config=config.data,
        memory=config.memory,
        callbacks=[*stability_callbacks(config, corpus.validation.tokens), budget, *callbacks],
        progress=progress,
    )
    progress = progress and ranks.is_main
    baselines = validation_baselines(corpus, training.evaluation_tokens)
    if progress:
        for name, bits in baselines.items():
            print(f"baseline {name}: {bits:.4f} bits per byte of the validation text")
    result = trainer.train()
    metrics, curve = trainer.output_dir / METRICS_FILE, trainer.output_dir / CURVE_FILE
    ranks.on_main(lambda: plot_loss_curve(metrics, curve, baselines=baselines, title=config.data.name))
    return RunResult(result, trainer.engine.whole_model().eval(), corpus, baselines, curve, ranks.is_main)


def validation_baselines(corpus: PreparedCorpus, evaluation_tokens: int) -> dict[str, float]:
    """Bits per byte of the text a `Trainer` evaluates, by `unigram` frequencies of the training tokens and by `xz`.

    Empty where the tokenizer does not tell the bytes behind its tokens.
    """
    if corpus.tokenizer.byte_lengths is None:
        return {}
    tokens = np.asarray(corpus.validation.tokens[1:evaluation_tokens])
    counts = token_counts(corpus.train.tokens, corpus.tokenizer.vocab_size)
    return {
        "unigram": unigram_bits_per_byte(counts, tokens, text_bytes=corpus.tokenizer.text_bytes(tokens)),
        "xz": xz_bits_per_byte(corpus.tokenizer.decode(tokens.tolist()).encode()),
    }
