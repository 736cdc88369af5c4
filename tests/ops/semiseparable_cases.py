"""Operands, the dense matrix form and comparisons shared by the tests of semiseparable mixing."""

from __future__ import annotations

import torch

from resnet_bk.ops.semiseparable import MixState, rotary_frequencies, semiseparable_mix

HEADS, STATE, VALUE = 3, 8, 5
SCALE = 0.35


def operands(batch, time, *, shared=True, decay=0.3, rows=None, position=0, seed=0, absent=()):
    """Every argument of `semiseparable_mix` by name, float64, less the options named in `absent`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = (batch, time, STATE) if shared else (batch, time, HEADS, STATE)
    rows = batch if rows is None else rows
    case = {
        "query": draw(*channels),
        "key": draw(*channels),
        "value": draw(batch, time, HEADS, VALUE),
        "log_decay": -decay * draw(batch, time, HEADS).abs(),
        "source": draw(batch, time, HEADS).abs(),
        "query_bias": draw(HEADS, STATE),
        "key_bias": draw(HEADS, STATE),
        "skip": draw(HEADS),
        "frequencies": rotary_frequencies(STATE, 100.0),
        "initial": MixState(draw(rows, HEADS, STATE, VALUE), torch.full((rows,), position)),
        "scale": SCALE,
    }
    return {name: value for name, value in case.items() if name not in absent}


def cast(case, dtype):
    """The same case with float tensors in another dtype; frequencies stay float64."""

    def to(name, x):
        if name == "initial":
            return MixState(x.memory.to(dtype), x.position)
        return x.to(dtype) if isinstance(x, torch.Tensor) and name != "frequencies" else x

    return {name: to(name, x) for name, x in case.items()}


def part(case, left, right, state=None):
    """The case's tokens left..right, continuing from `state`."""
    tokens = ("query", "key", "value", "log_decay", "source")
    cut = {name: x[:, left:right] if name in tokens else x for name, x in case.items()}
    return cut if state is None else {**cut, "initial": state}


def mix(case, **options):
    """`semiseparable_mix` of a case: y and the state."""
    names = ("query", "key", "value", "log_decay")
    rest = {name: value for name, value in case.items() if name not in names}
    return semiseparable_mix(*(case[name] for name in names), **rest, **options)


def run(case, **options):
    """y and the final memory of a case."""
    y, state = mix(case, **options)
    return y, state.memory


def with_gradients(case, **options):
    """By name: y, final memory, and the gradient of every floating operand under a fixed random functional."""
    leaves = {}
    case = dict(case)
    for name, x in case.items():
        if name == "initial":
            leaves[name] = x.memory.detach().clone().requires_grad_()
            case[name] = MixState(leaves[name], x.position)
        elif isinstance(x, torch.Tensor) and name != "frequencies":
            leaves[name] = case[name] = x.detach().clone().requires_grad_()
    outputs = run(case, **options)
    return {"y": outputs[0], "memory": outputs[1]} | dict(
        zip((f"d {name}" for name in leaves), gradients(outputs, list(leaves.values())), strict=True)
    )


def gradients(outputs, leaves):
    """Gradients of a fixed random functional of all outputs."""
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs)
    return torch.autograd.grad(loss, leaves)


def worst(ours, theirs):
    """By name: the largest difference over the largest magnitude (over one where that is smaller)."""
    return {
        name: ((ours[name].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1)).item()
        for name, x in theirs.items()
    }


def dense(case):
    """(y, final memory) from whole time-by-time matrices: masked decays times scores with phases of distances."""
    value, memory = case["value"], case["initial"].memory if "initial" in case else None
    batch, time = value.shape[:2]
    query, key = (
        (x if x.dim() == 4 else x.unsqueeze(2)).expand(batch, time, HEADS, STATE) for x in (case["query"], case["key"])
    )
    query, key = query + case.get("query_bias", 0), key + case.get("key_bias", 0)
    query, key = (torch.complex(*x.chunk(2, dim=-1)) for x in (query, key))
    frequencies = case.get("frequencies", torch.zeros(STATE // 2, dtype=torch.float64))
    place = torch.arange(time, dtype=torch.float64)
    phase = torch.exp(1j * frequencies * (place[:, None] - place)[..., None])
    scores = torch.einsum("bihp,bjhp,ijp->bhij", query, key.conj(), phase).real
    total = case["log_decay"].cumsum(1).transpose(1, 2)
    future = place[:, None] < place
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
    incoming = value * case["source"][..., None] if "source" in case else value
    y = case["scale"] * torch.einsum("bhij,bjhv->bihv", scores * decay, incoming)
    offset = case["initial"].position[0] if memory is not None else 0
    turned = torch.exp(1j * frequencies * (place + offset)[:, None])[:, None]
    fade = (total[..., -1:] - total).exp().transpose(1, 2)
    wide = incoming.to(torch.complex128)
    final = torch.einsum("bthp,bthv->bhpv", key * turned * fade[..., None], wide)
    final = torch.cat((final.real, final.imag), dim=2)
    if memory is not None:
        lasting = total.exp().transpose(1, 2)
        behind = torch.complex(*memory.chunk(2, dim=2))
        recalled = torch.einsum("bthp,bhpv->bthv", query * turned, behind.conj()).real
        y = y + case["scale"] * lasting[..., None] * recalled
        final = final + lasting[:, -1, :, None, None] * memory
    if "skip" in case:
        y = y + case["skip"][:, None] * value
    return y, final
