"""The scans of Mamba-2 and Mamba-3: the library's forms against the recurrences token by token; cut, packed, causal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from resnet_bk.errors import BackendError, ShapeError
from resnet_bk.ops.state_space import TrapezoidState, choose_scan_backend, mamba2_scan, mamba3_scan, published

BATCH, HEADS, VALUE, STATE = 2, 3, 4, 8
KINDS = ["mamba2", "mamba3"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(kind, time, *, batch=BATCH, dtype=torch.float64):
    """Operands [batch, time, ...], operands of heads, and a state to start from, all of them leaves."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    step = F.softplus(normal(batch, time, HEADS))
    tokens = {"value": normal(batch, time, HEADS, VALUE), "step": step}
    tokens |= {name: normal(batch, time, STATE) for name in ("write", "read")}
    memory = normal(batch, HEADS, STATE, VALUE)
    if kind == "mamba2":
        per_head = {"rate": -F.softplus(normal(HEADS)), "skip": normal(HEADS)}
        state = memory
    else:
        tokens |= {"log_decay": -F.softplus(normal(batch, time, HEADS)) * step}
        tokens |= {"trapezoid": normal(batch, time, HEADS), "turn": normal(batch, time, STATE // 4)}
        tokens |= {"gate": normal(batch, time, HEADS, VALUE)}
        per_head = {"skip": normal(HEADS)} | {name: normal(HEADS, STATE) for name in ("write_bias", "read_bias")}
        angle = normal(batch, HEADS, STATE // 4)
        state = TrapezoidState(memory, angle, normal(batch, HEADS, STATE), normal(batch, HEADS, VALUE))
    for leaf in (*tokens.values(), *per_head.values(), *leaves(state)):
        leaf.requires_grad_()
    return tokens, per_head, state


def leaves(state):
    return list(state) if isinstance(state, tuple) else [state]


def scan(kind, tokens, per_head, state=None, **options):
    """Output and the tensors of the state after it."""
    names = ["value", "step", "rate", "write", "read"]
    if kind == "mamba3":
        names = ["value", "step", "log_decay", "trapezoid", "write", "read", "turn"]
    operands = tokens | per_head
    rest = {name: x for name, x in operands.items() if name not in names}
    function = mamba2_scan if kind == "mamba2" else mamba3_scan
    y, after = function(*(operands[name] for name in names), **rest, initial=state, **options)
    return y, after


def row_of(state, row):
    if isinstance(state, tuple):
        return TrapezoidState(*(part[row : row + 1] for part in state))
    return state[row : row + 1]


def cut(tokens, start, end):
    return {name: x[:, start:end] for name, x in tokens.items()}


@every_kind
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("started", [False, True])
def test_chunked_is_the_reference_with_its_gradients(kind, time, started):
    tokens, per_head, state = draw(kind, time)
    inputs = [*tokens.values(), *per_head.values(), *(leaves(state) if started else [])]
    results = []
    for backend in ("reference", "auto"):
        y, after = scan(kind, tokens, per_head, state if started else None, backend=backend)
        # The angle is known up to full turns.
        ends = [x.cos() if place == 1 else x for place, x in enumerate(leaves(after))]
        loss = y.sin().sum() + sum(end.sin().sum() for end in ends)
        results.append((y, *ends, *torch.autograd.grad(loss, inputs)))
    for exact, ours in zip(*results, strict=True):
        assert (exact - ours).abs().max() / exact.abs().max().clamp(min=1) < 1e-11  # measured 1e-13


@pytest.mark.parametrize("started", [False, True])
def test_mamba2_is_a_sum_over_the_past(started):
    tokens, per_head, state = draw("mamba2", 30)
    y, _ = scan("mamba2", tokens, per_head, state if started else None)
    total = (tokens["step"] * per_head["rate"]).cumsum(1)
    decay = torch.where(
        torch.ones(30, 30).tril().bool()[..., None], (total[:, :, None] - total[:, None]).exp(), 0
    )  # [batch, i, j, heads]
    scores = torch.einsum("bin,bjn->bij", tokens["read"], tokens["write"])[..., None] * decay
    expected = torch.einsum("bijh,bjh,bjhp->bihp", scores, tokens["step"], tokens["value"])
    expected = expected + per_head["skip"][:, None] * tokens["value"]
    if started:
        expected = expected + torch.einsum("bin,bih,bhnp->bihp", tokens["read"], total.exp(), state)
    assert (y - expected).abs().max() < 1e-12  # measured 3e-14


def test_mamba3_is_a_sum_over_the_past_in_complex_numbers():
    """Independent of both forms: the trapezoid's kernel by products of decays, rotations as complex phases."""
    tokens, per_head, _ = draw("mamba3", 25)
    y, _ = scan("mamba3", tokens, per_head)
    step, share = tokens["step"], tokens["trapezoid"].sigmoid()
    total = tokens["log_decay"].cumsum(1)
    decay = torch.where(torch.ones(25, 25).tril().bool()[..., None], (total[:, :, None] - total[:, None]).exp(), 0)
    later = torch.cat(((1 - share[:, 1:]) * step[:, 1:], torch.zeros_like(step[:, :1])), 1)
    weight = decay * (share * step + later)[:, None]
    # At its own place a token has only its own share.
    weight = weight - torch.diag_embed(later.movedim(1, 2)).movedim(1, 3)
    angle = (torch.pi * tokens["turn"].tanh()[:, :, None] * step[..., None]).cumsum(1)
    pairs = []
    for name in ("read", "write"):
        x = tokens[name][:, :, None] + per_head[f"{name}_bias"]
        turned = torch.complex(x[..., 0 : STATE // 2 : 2], x[..., 1 : STATE // 2 : 2]) * torch.exp(1j * angle)
        pairs.append((turned, x[..., STATE // 2 :]))
    (q, q_rest), (k, k_rest) = pairs
    scores = torch.einsum("bihp,bjhp->bijh", q, k.conj()).real + torch.einsum("bihp,bjhp->bijh", q_rest, k_rest)
    expected = torch.einsum("bijh,bjhv->bihv", scores * weight, tokens["value"])
    expected = (expected + per_head["skip"][:, None] * tokens["value"]) * F.silu(tokens["gate"])
    assert (y - expected).abs().max() < 1e-12  # measured 3e-14


@every_kind
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_cut_anywhere_and_packed_are_one_run(kind, backend):
    tokens, per_head, state = draw(kind, 40)
    whole, end = scan(kind, tokens, per_head, state, backend=backend)
    for place in (1, 16, 39):
        first, between = scan(kind, cut(tokens, 0, place), per_head, state, backend=backend)
        second, last = scan(kind, cut(tokens, place, 40), per_head, between, backend=backend)
        assert (torch.cat((first, second), 1) - whole).abs().max() < 1e-11  # measured 6e-14
        assert all((a - b).abs().max() < 1e-11 for a, b in zip(leaves(last), leaves(end), strict=True))
    with torch.no_grad():
        outputs, after = [], state
        for t in range(40):
            y, after = scan(kind, cut(tokens, t, t + 1), per_head, after, backend=backend)
            outputs.append(y)
    assert (torch.cat(outputs, 1) - whole).abs().max() < 1e-11  # measured 6e-14
    bounds = [0, 1, 9, 40]
    one_row = {name: x[:1] for name, x in tokens.items()}
    three = scan(kind, cut({name: x[:1].expand(3, *x.shape[1:]) for name, x in tokens.items()}, 0, 5), per_head)[1]
    for initial in (None, three):
        packed, ends = scan(
            kind, one_row, per_head, initial, cu_seqlens=torch.tensor(bounds), backend=backend
        )  # fmt: skip
        for document, (left, right) in enumerate(pairwise(bounds)):
            before = None if initial is None else row_of(initial, document)
            alone, after = scan(kind, cut(one_row, left, right), per_head, before, backend=backend)
            assert (packed[:, left:right] - alone).abs().max() < 1e-11  # measured 2e-14
            pairs = zip(leaves(row_of(ends, document)), leaves(after), strict=True)
            assert all((a - b).abs().max() < 1e-11 for a, b in pairs)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_past_is_bit_identical_whatever_the_future(kind, dtype):
    tokens, per_head, _ = draw(kind, 200, dtype=dtype)
    with torch.no_grad():
        before, _ = scan(kind, tokens, per_head)
        for place in (1, 63, 64, 65, 199):
            changed = {name: x.clone() for name, x in tokens.items()}
            for name, x in changed.items():
                x[:, place:] *= 3 if name in ("step", "log_decay") else -1e3
            after, _ = scan(kind, changed, per_head)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place], before[:, place])


@every_kind
def test_gradients_are_right(kind):
    tokens, per_head, state = draw(kind, 5, batch=1)
    names, heads = list(tokens), list(per_head)

    def run(*inputs):
        given = dict(zip(names, inputs, strict=False))
        each = dict(zip(heads, inputs[len(names) :], strict=False))
        rest = inputs[len(names) + len(heads) :]
        y, after = scan(kind, given, each, rest[0] if kind == "mamba2" else TrapezoidState(*rest))
        return y, *leaves(after)

    assert torch.autograd.gradcheck(run, [*tokens.values(), *per_head.values(), *leaves(state)])


def test_bfloat16_is_near_float64():
    for kind in KINDS:
        tokens, per_head, _ = draw(kind, 100, dtype=torch.bfloat16)
        exact, _ = scan(kind, {n: x.double() for n, x in tokens.items()}, {n: x.double() for n, x in per_head.items()})
        y, after = scan(kind, tokens, per_head)
        assert y.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for x in leaves(after))
        assert (y.double() - exact).abs().max() / exact.abs().max() < 0.02  # measured 0.004


def test_angles_stay_exact_over_many_tokens():
    time = 20000
    tokens, per_head, _ = draw("mamba3", time, batch=1)
    tokens = {name: x.detach() for name, x in tokens.items()}
    tokens["turn"] = tokens["turn"].abs()
    exact = (torch.pi * tokens["turn"].tanh()[:, :, None] * tokens["step"][..., None]).sum(1)
    narrow = {name: x.float() for name, x in tokens.items()}
    for given in (tokens, narrow):
        angle = scan("mamba3", given, {name: x.to(given["value"].dtype) for name, x in per_head.items()})[1].angle
        error = torch.remainder(angle - exact + torch.pi, 2 * torch.pi) - torch.pi
        assert error.abs().max() < 2e-4  # measured 3e-5 from rounding every turn to float32, of 28,000 rad


class TestBadInput:
    @every_kind
    @pytest.mark.parametrize("name", ["step", "write", "read", "skip"])
    def test_operands_that_do_not_fit(self, kind, name):
        tokens, per_head, _ = draw(kind, 5)
        operands = tokens if name in tokens else per_head
        operands[name] = operands[name][..., 1:]
        with pytest.raises(ShapeError, match=r"\w+ must be \[.*\]; got \["):
            scan(kind, tokens, per_head)

    @every_kind
    def test_a_state_of_other_rows(self, kind):
        tokens, per_head, state = draw(kind, 5)
        with pytest.raises(ShapeError, match=r"must be \[2, 3, 8, 4\]; got \[1, 3, 8, 4\]"):
            scan(kind, tokens, per_head, row_of(state, 0))

    @every_kind
    def test_backends_by_name(self, kind):
        tokens, per_head, _ = draw(kind, 5)
        with pytest.raises(BackendError, match="expected one of 'auto', 'reference', 'chunked', 'triton', 'published'"):
            scan(kind, tokens, per_head, backend="mamba_ssm")
        with pytest.raises(BackendError, match=r"'published' cannot run: the kernels compute in float32"):
            scan(kind, tokens, per_head, backend="published")

    def test_what_the_published_kernels_cannot_do(self, monkeypatch):
        monkeypatch.setattr(published, "obstacle", lambda operand: None)
        tokens, per_head, _ = draw("mamba2", 5, batch=1, dtype=torch.float32)
        with pytest.raises(BackendError, match="'published' cannot run: the kernels do not return the memories"):
            scan("mamba2", tokens, per_head, cu_seqlens=torch.tensor([0, 5]), backend="published")
        tokens, per_head, _ = draw("mamba3", 5, dtype=torch.float32)
        with pytest.raises(BackendError, match="states and values of 16, 32, 64, 128 or 256 channels, not 8, 4"):
            scan("mamba3", tokens, per_head, backend="published")
        with pytest.raises(BackendError, match=r"at most 2,147,483,647 elements .* the values has 2,147,483,648"):
            published.check_offsets(2**31, "the values")

    def test_on_a_cpu_auto_is_chunked(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert choose_scan_backend("auto", torch.zeros(1, dtype=dtype)) == "chunked"
