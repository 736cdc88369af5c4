"""Prompts through a model at constant memory: packed where they are short, in segments where they are long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.errors import MemoryLimitError
from resnet_bk.layers.attention import join_rows

if TYPE_CHECKING:
    from resnet_bk.models.config import ModelConfig
    from resnet_bk.models.resnet_bk import LanguageModel, ModelState


def prefill(
    model: LanguageModel, prompts: list[Int[Tensor, " time"]]
) -> tuple[Float[Tensor, "rows d_model"], ModelState]:
    """Hidden state of the last token of every prompt, and the decode state after it, one row a prompt.

    Prompts are packed end to end, none seeing another, up to `model.segment_tokens` tokens at a time; a longer prompt
    runs alone, in segments of that length with its state carried. Memory is that of one segment and the states.
    """
    device, limit = model.output_weight.device, model.segment_tokens
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    packs: list[list[int]] = []
    room = 0
    for row in order:
        length = len(prompts[row])
        if length > room:
            packs.append([])
            room = limit
        packs[-1].append(row)
        room -= length
    last: list[Tensor] = []
    states: list[ModelState] = []
    for pack in packs:
        if len(pack) == 1:
            first, *rest = (segment[None].to(device) for segment in prompts[pack[0]].split(limit))
            hidden, state = evaluate(model, first)
            for segment in rest:
                hidden, state = evaluate(model, segment, state=state)
            last.append(hidden[:, -1])
        else:
            ends = torch.tensor([len(prompts[row]) for row in pack]).cumsum(0)
            ids = torch.cat([prompts[row] for row in pack])
            hidden, state = evaluate(model, ids[None].to(device), cu_seqlens=F.pad(ends, (1, 0)).to(device))
            last.append(hidden[0, ends.to(device) - 1])
        states.append(state)
    # Back to the order of the prompts.
    place = torch.tensor(order).argsort().to(device)
    return torch.cat(last)[place], _join(states).select(place)


@torch.no_grad()
def evaluate(model: LanguageModel, ids: Tensor, **options: Any) -> tuple[Tensor, ModelState]:
    """`model.hidden_states` in evaluation mode, whatever mode the model is in."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        return model.hidden_states(ids, **options)
    finally:
        for module in training:
            module.training = True


def _join(states: list[ModelState]) -> ModelState:
    """The rows of all states in one."""
    joined = iter([join_rows(parts) for parts in zip(*(state.tensors for state in states), strict=True)])
    return states[0].map(lambda _: next(joined))


def memory_needed(
    config: ModelConfig, prompt_lengths: Sequence[int], segment_tokens: int, itemsize: int = 4
) -> dict[str, int]:
    """Bytes that generating takes beyond the weights, by what takes them; within a factor of 2 above the truth.

    Args:
        config: architecture.
        prompt_lengths: tokens of each prompt.
        segment_tokens: tokens worked on at once.
        itemsize: bytes of one number; gates and states are at least float32.
    """
    rows, total = len(prompt_lengths), sum(prompt_lengths)
    # Widths of the tensors alive in the widest place of a block; checked against measured peaks in the tests.
    width = 8 * (config.d_model + config.inner_dim) + 5 * config.feed_forward_dim + 4 * config.state_size
    if config.phase_coupling or config.peierls_pairs:
        width += 4 * config.num_heads * config.state_size
    memory = (len(config.mixers) - config.mixers.count("attention")) * config.inner_dim * config.state_size
    if "attention" in config.mixers:
        # Every row has as many slots as the longest prompt fills.
        slots = min(max(prompt_lengths, default=0), config.attention_window or math.inf)
        memory += config.mixers.count("attention") * 2 * config.d_model * int(slots)
    return {
        "states": 3 * rows * memory * itemsize,  # before and after a step, and while rows are joined or dropped
        "one segment": max(rows, min(total, segment_tokens)) * width * itemsize,
        "logits": rows
        * config.vocab_size
        * (itemsize + 36),  # float32 logits; probabilities and their order in float64
        "tokens": 24 * total,
    }


def _available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`; None where that is not known."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return None


def check_memory(model: LanguageModel, prompts: list[Int[Tensor, " time"]]) -> None:
    """Raise `MemoryLimitError`, saying how much is needed for what, if the prompts do not fit in memory."""
    weight = model.output_weight
    available = _available_bytes(weight.device)
    needed = memory_needed(model.config, [len(ids) for ids in prompts], model.segment_tokens, max(4, weight.itemsize))
    if available is not None and sum(needed.values()) > available:
        parts = ", ".join(f"{size / 1e9:.3g} GB for {what}" for what, size in needed.items())
        raise MemoryLimitError(
            f"Generating for {len(prompts)} prompts of {sum(map(len, prompts))} tokens needs about "
            f"{sum(needed.values()) / 1e9:.3g} GB ({parts}), and {available / 1e9:.3g} GB is free on {weight.device}. "
            f"Give fewer prompts at once, or lower model.segment_tokens = {model.segment_tokens}."
        )
