from __future__ import annotations

from typing import NamedTuple

import torch

from resnet_bk.training.batches import count_targets, model_arguments


class Packed(NamedTuple):
    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


IDS = torch.arange(12).view(2, 6)


def test_mappings_and_named_tuples_become_arguments():
    for batch in ({"input_ids": IDS}, {"input_ids": IDS, "extra": 1}, Packed(IDS)):
        arguments = model_arguments(batch)
        assert arguments.keys() == {"input_ids", "labels"} and arguments["labels"] is IDS
    arguments = model_arguments({"input_ids": IDS, "labels": IDS + 1})
    assert torch.equal(arguments["labels"], IDS + 1)


def test_first_tokens_and_ignored_labels_are_not_targets():
    assert count_targets({"labels": IDS}) == 10
    labels = IDS.clone()
    labels[0, 0] = labels[0, 2] = labels[1, 5] = -100
    assert count_targets({"labels": labels}) == 8
    assert labels[0, 1] == 1  # counting changes nothing


def test_first_tokens_of_packed_documents_are_not_targets():
    arguments = model_arguments(Packed(IDS.view(1, 12), torch.tensor([0, 1, 2, 9, 12], dtype=torch.int32)))
    # Documents of 1, 1, 7 and 3 tokens.
    assert count_targets(arguments) == 0 + 0 + 6 + 2
    arguments["labels"] = arguments["labels"].masked_fill(arguments["labels"] == 10, -100)
    assert count_targets(arguments) == 7
