"""Prompts in every form that users have them, as one list of token tensors; and sequences back in that form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnet_bk.errors import DataError, DomainError, ShapeError

if TYPE_CHECKING:
    from resnet_bk.tokenizer import Tokenizer

AnyPrompts = str | Tensor | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass
class Prompts:
    """Prompts as read, and what is needed to answer in the same form."""

    ids: list[Tensor]
    """Token ids of each prompt, int64 [time] on the CPU, not empty."""
    single: bool = False
    """Whether there was one prompt outside any list or batch."""
    text: list[str] | None = None
    """The prompts' text if they were given as text."""
    devices: list[torch.device] | None = None
    """Where the prompts were if they were given as tensors [time]."""
    batch: Tensor | None = None
    """The tensor [batch, time] that held them, if one did."""

    def restore(self, sequences: list[list[int]], text: list[str] | None, filler: int) -> object:
        """`sequences` (or `text`) in the form of the prompts; `filler` pads the rows of a batch."""
        if self.batch is not None:
            added = [sequence[len(ids) :] for sequence, ids in zip(sequences, self.ids, strict=True)]
            width = max(map(len, added))
            filled = torch.tensor([tokens + [filler] * (width - len(tokens)) for tokens in added])
            return torch.cat((self.batch.long(), filled.to(self.batch.device)), dim=1)
        answers = sequences if self.text is None else text or []
        if self.devices is not None:
            answers = [torch.tensor(ids, device=at) for ids, at in zip(sequences, self.devices, strict=True)]
        return answers[0] if self.single else answers


def read_prompts(
    prompts: AnyPrompts, attention_mask: Tensor | None, vocabulary: int, tokenizer: Tokenizer | None
) -> Prompts:
    """The prompts, checked.

    Raises:
        DomainError: no prompt, an empty one, or a token id outside [0, vocabulary).
        ShapeError: a tensor or mask of another shape or type.
        DataError: text without a tokenizer.
    """
    if attention_mask is not None and not (isinstance(prompts, Tensor) and prompts.dim() == 2):
        raise ShapeError("attention_mask goes with prompts in one tensor [batch, time]; lists carry their own lengths.")
    if isinstance(prompts, Tensor):
        read = _from_tensor(prompts, attention_mask)
    elif isinstance(prompts, str):
        read = Prompts(_encode([prompts], tokenizer), single=True, text=[prompts])
    elif len(prompts) and all(isinstance(prompt, str) for prompt in prompts):
        text = [str(prompt) for prompt in prompts]
        read = Prompts(_encode(text, tokenizer), text=text)
    elif len(prompts) and all(isinstance(prompt, int) for prompt in prompts):
        read = Prompts([_from_ids(prompts, 0)], single=True)
    else:
        read = Prompts([_from_ids(ids, row) for row, ids in enumerate(prompts)])
        tensors = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
        if len(tensors) == len(prompts):
            read.devices = [tensor.device for tensor in tensors]
    if not read.ids:
        raise DomainError("There is no prompt; give at least one.")
    for row, ids in enumerate(read.ids):
        if ids.numel() == 0:
            raise DomainError(f"Prompt {row} is empty; give at least one token, such as the tokenizer's end of text.")
        outside = ((ids < 0) | (ids >= vocabulary)).nonzero()
        if outside.numel():
            place = int(outside[0])
            raise DomainError(
                f"Prompt {row} holds token id {int(ids[place])} at position {place}; expected ids in "
                f"[0, {vocabulary}). The tokenizer and the model have different vocabularies."
            )
    return read


def _encode(text: list[str], tokenizer: Tokenizer | None) -> list[Tensor]:
    if tokenizer is None:
        raise DataError("The prompt is text, but the model has no tokenizer; set model.tokenizer or give token ids.")
    return [torch.tensor(ids, dtype=torch.long) for ids in tokenizer.encode_batch(text)]


def _from_ids(ids: object, row: int) -> Tensor:
    """One prompt given as a list of integers or a tensor [time]."""
    try:
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is not None and tensor.numel() == 0:
        return torch.empty(0, dtype=torch.long)
    if tensor is None or tensor.dim() != 1 or not _is_integer(tensor):
        raise ShapeError(
            f"Prompt {row} is {ids!r:.60}; expected text, a list of token ids or an integer tensor [time]."
        )
    return tensor.detach().cpu().long()


def _from_tensor(tensor: Tensor, attention_mask: Tensor | None) -> Prompts:
    if tensor.dim() not in (1, 2) or not _is_integer(tensor):
        raise ShapeError(
            f"The prompt tensor is {tensor.dtype} {list(tensor.shape)}; expected integers [batch, time] or [time]."
        )
    if tensor.dim() == 1:
        return Prompts([_from_ids(tensor, 0)], single=True, devices=[tensor.device])
    rows = list(tensor.detach().cpu().long())
    if attention_mask is not None:
        if attention_mask.shape != tensor.shape:
            raise ShapeError(
                f"attention_mask has shape {list(attention_mask.shape)}; expected that of the prompts, "
                f"{list(tensor.shape)}."
            )
        mask = attention_mask.detach().cpu()
        if not ((mask == 0) | (mask == 1)).all():
            raise DomainError("attention_mask holds values other than 0 (padding) and 1 (token).")
        mask = mask.bool()
        for row, kept in enumerate(mask):
            if int((kept[1:] & ~kept[:-1]).sum() + kept[:1].sum()) > 1:
                raise DomainError(f"attention_mask row {row} has a gap; padding must lie before or after the tokens.")
        rows = [ids[kept] for ids, kept in zip(rows, mask, strict=True)]
    return Prompts(rows, batch=tensor)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
