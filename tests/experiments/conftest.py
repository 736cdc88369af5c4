"""A corpus and models small enough to train in a fraction of a second."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from resnet_bk.data.files import Document
from resnet_bk.data.shards import write_shard
from resnet_bk.experiments.corpora import ExperimentCorpus, open_tokens
from resnet_bk.models.config import ModelConfig
from resnet_bk.tokenizer import Tokenizer
from resnet_bk.training.config import TrainingConfig

WORDS = ["alpha", "beta", "gamma", "delta", "the", "of", "and"]


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory) -> Path:
    """Shards of three splits of short documents, with their tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    draw = random.Random(0)

    def documents(split: str, count: int) -> list[Document]:
        texts = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 60))) for _ in range(count)]
        return [Document(f"{split}/{number}", text) for number, text in enumerate(texts)]

    splits = {name: documents(name, count) for name, count in (("train", 60), ("validation", 5), ("test", 5))}
    tokenizer = Tokenizer.train([document.text for document in splits["train"]], 280)
    tokenizer.save(folder)
    for name, parts in splits.items():
        write_shard(folder, name, parts, tokenizer)
    return folder


@pytest.fixture(scope="session")
def corpus(token_folder) -> ExperimentCorpus:
    return open_tokens(token_folder)


@pytest.fixture(scope="session")
def toy_model(corpus) -> ModelConfig:
    return ModelConfig(
        vocab_size=corpus.vocab_size,
        d_model=32,
        num_layers=2,
        feed_forward_dim=64,
        head_dim=16,
        state_size=8,
        attention_head_dim=16,
    )


@pytest.fixture(scope="session")
def toy_training() -> TrainingConfig:
    return TrainingConfig(
        steps=8,
        sequence_length=16,
        batch_size=3,
        warmup_steps=2,
        evaluation_tokens=64,
        device="cpu",
        precision="float32",
    )
