"""Triton kernels of the causal resolvent and the flux gates: three passes forward, three backward; see DERIVATION.md.

`fold_kernel` composes the maps of whole rows, for sequences that ranks share.

A lane is one head of one *slot*, a stretch of up to `chunk` tokens of one row (a sequence of the batch or a packed
document). Slots never cross rows, so no loop over sites looks for document starts; the first slot of a row composes
to a constant map instead. Loops take `_SITES` sites at a time and begin with all their loads.
One long file, because only a `triton.py` may import Triton.
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

# Sites per tile. Growth within a tile must stay inside float64; see "Rescaling" in DERIVATION.md.
_SITES = tl.constexpr(4)

# Nothing is gained from knowing these when a kernel is compiled, and every other length would compile it again.
_SIZES = ("rows", "row_length", "search", "chunk", "slots", "heads", "per_group", "initial_stride")
_STRIDES = ("detuning_stride", "absorption_stride", "source_stride")
_kernel = partial(triton.jit, do_not_specialize=[*_SIZES, *_STRIDES])


@triton.jit
def _inverse(x):
    """1 / x for normal x > 0 to half an ulp. Newton's step on the fast root is half the instructions of a division."""
    root = tl.rsqrt(x)
    fast = root * root
    return tl.fma(fast, tl.fma(-x, fast, 1.0), fast)


@triton.jit
def _exp(x):
    """exp(x) for moderate x: exp2 with the rounding of its argument put back, which the fast exp loses."""
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.925963033500e-8, tl.fma(x, 1.44269502162933349609375, -high))
    power = tl.exp2(high)
    return tl.fma(power, low * 0.6931471805599453, power)


@triton.jit
def _log1p_unit(x):
    """log(1 + x) for x in [0, 1], exact to rounding of itself: 2 atanh(x / (2 + x)), interpolated to 4e-9."""
    s = x * _inverse(2.0 + x)
    t = s * s
    series = 0.33333161 + t * (0.20012298 + t * (0.13982579 + t * 0.14078889))
    return 2.0 * (s + s * (t * series))


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1e38], exact to rounding of itself."""
    exponent = ((1.0 + x).to(tl.int32, bitcast=True) >> 23) - 127
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return _log1p_unit(x * scale + (scale - 1.0)) + exponent.to(tl.float32) * 0.6931471805599453


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) and its derivative, the sigmoid."""
    small = _exp(-tl.abs(x))
    share = _inverse(1.0 + small)
    return tl.maximum(x, 0.0) + _log1p_unit(small), tl.where(x < 0.0, small * share, share)


@triton.jit
def _sigmoid(x):
    return _softplus(x)[1]


@triton.jit
def _head_parameter(pointer, head, live, KIND: tl.constexpr):
    """One value a head in float32; 0 where this kind of call has none."""
    if KIND == "plain" or pointer is None:
        return tl.zeros_like(head).to(tl.float32)
    else:
        return tl.load(pointer + head, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _place(
    cu_seqlens, rows, row_length, search, chunk, slots, heads, PACKED: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Where each lane works: slot, head, row, first token, number of sites, whether it begins and ends its row."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    slot = (lane // heads).to(tl.int32)
    head = (lane % heads).to(tl.int32)
    live = slot < slots
    if PACKED:
        # A document that starts at token b has its slots from b // chunk + document on, one more than it may need.
        row = tl.zeros_like(slot)
        high = row + (rows - 1)
        for _ in range(0, search):
            middle = (row + high + 1) // 2
            begins = (tl.load(cu_seqlens + middle) // chunk).to(tl.int32) + middle <= slot
            row = tl.where(begins, middle, row)
            high = tl.where(begins, high, middle - 1)
        left = tl.load(cu_seqlens + row).to(tl.int32)
        right = tl.load(cu_seqlens + row + 1).to(tl.int32)
        index = slot - left // chunk - row
    else:
        slots_of_row = (row_length + chunk - 1) // chunk
        row = slot // slots_of_row
        index = slot - row * slots_of_row
        left = row * row_length
        right = left + row_length
    start = left + index * chunk
    sites = tl.where(live, tl.minimum(tl.maximum(right - start, 0), chunk), 0)
    return slot, head, row, start, sites, live & (index == 0), (sites > 0) & (start + sites == right)


@triton.jit
def _at(pointer, token, stride, head):
    """Where each lane's values begin. Offsets from here fit 32 bits, offsets from `pointer` need not."""
    return pointer + token.to(tl.int64) * stride + head


@triton.jit
def _read(pointer, live, OTHER: tl.constexpr):
    return tl.load(pointer, mask=live, other=OTHER).to(tl.float32)


@triton.jit
def _tile(pointer, t, stride, left, OTHER: tl.constexpr):
    """Values of `_SITES` sites from site t on; OTHER beyond the `left` that remain."""
    return (
        _read(pointer + t * stride, left > 0, OTHER),
        _read(pointer + (t + 1) * stride, left > 1, OTHER),
        _read(pointer + (t + 2) * stride, left > 2, OTHER),
        _read(pointer + (t + 3) * stride, left > 3, OTHER),
    )


@triton.jit
def _medium(a, e, scale, energy, bias, floor, KIND: tl.constexpr):
    """Detuning and absorption of a site from its two inputs."""
    if KIND == "plain":
        return a, e
    else:
        return scale * a - energy, _softplus(e + bias)[0] + floor


@triton.jit
def _principal_root(x, y):
    """Real parts a and b > 0 with (a - i b)^2 = x - i y, for y > 0."""
    large = tl.sqrt((tl.sqrt(x * x + y * y) + tl.abs(x)) * 0.5)
    small = y / (2.0 * large)
    return tl.where(x >= 0.0, large, small), tl.where(x >= 0.0, small, large)


@triton.jit
def _free_root(energy, eta):
    """Decaying root m at detuning -energy, and its derivative by alpha = -energy - i eta; see `decaying_root`."""
    above_r, above_i = _principal_root(1.0 - 0.5 * energy, 0.5 * eta)
    below_r, below_i = _principal_root(-1.0 - 0.5 * energy, 0.5 * eta)
    x, y = above_r + below_r, above_i + below_i
    square = x * x + y * y
    x, y = x / square, y / square
    real, imag = 2.0 * (x - y) * (x + y), 4.0 * x * y
    # 1 / m - m = 2 A B for the roots A and B of alpha / 2 + 1 and alpha / 2 - 1, so dm / dalpha = -m / (2 A B).
    root_r = 2.0 * (above_r * below_r - above_i * below_i)
    root_i = -2.0 * (above_r * below_i + above_i * below_r)
    square = root_r * root_r + root_i * root_i
    slope_r = -(real * root_r + imag * root_i) / square
    slope_i = -(imag * root_r - real * root_i) / square
    return real, imag, slope_r, slope_i


@triton.jit
def _initial(real, imag, stride, row, head, first, energy, bias, floor, LEAD: tl.constexpr):
    """Green function m before the row: the lead, or what the caller gave."""
    if LEAD:
        m_r, m_i, _, _ = _free_root(energy, _softplus(bias)[0] + floor)
        return m_r, m_i
    else:
        return _read(_at(real, row, stride, head), first, 0.0), _read(_at(imag, row, stride, head), first, 0.0)


@triton.jit
def _flux(u, eta):
    """Log decay and weight of the flux gate, u = Im m one site earlier; see `flux_gate`."""
    wall = u == 0.0  # nothing decays
    decay = -0.5 * _log1p(eta * _inverse(tl.where(wall, 1.0, u)))
    return tl.where(wall, 0.0, decay), eta * tl.rsqrt(eta * (u + eta))


@triton.jit
def _pull_gates(u, e, s, g_decay, g_weight, bias, source_bias, floor, KIND: tl.constexpr):
    """Cotangents of u, of the absorption through the gates and of the raw source; and the slope of the absorption."""
    eta, slope = _softplus(e + bias)
    eta += floor
    total = u + eta
    root = tl.rsqrt(eta * total)
    root *= 1.5 - (0.5 * eta * total) * (root * root)
    b = eta * root
    half = 0.5 * b * root  # 1 / (2 (u + eta))
    g_b = g_weight
    d_s = tl.zeros_like(u)
    if KIND == "gated":
        opening = _sigmoid(s + source_bias)
        g_b = g_weight * opening
        d_s = g_b * b * (1.0 - opening)
    if KIND == "free":
        g_b = tl.zeros_like(u)
        d_s = g_weight * _sigmoid(s + source_bias)
    wall = u == 0.0  # nothing decays, whatever the absorption
    g_decay = tl.where(wall, 0.0, g_decay)
    d_u = half * (g_decay * eta * _inverse(tl.where(wall, 1.0, u)) - g_b * b)
    d_eta = half * (g_b * (u * root) - g_decay)
    return d_u, d_eta, d_s, slope


@triton.jit
def _power_of_two(x):
    """The power of two that brings x > 0 into [1, 2)."""
    exponent = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return (0x7FE0000000000000 - exponent).to(tl.float64, bitcast=True)


@triton.jit
def _scale_of(y_r, y_i):
    """The power of two that makes y about 1. It suffices for x too: |x / y| is a Green function's modulus."""
    return _power_of_two(tl.maximum(tl.abs(y_r), tl.abs(y_i)))


@triton.jit
def _rescaled(state):
    """A pair of solutions (eight numbers) over a common power of two."""
    by = _scale_of(state[2], state[3])
    return (
        state[0] * by, state[1] * by, state[2] * by, state[3] * by,
        state[4] * by, state[5] * by, state[6] * by, state[7] * by,
    )  # fmt: skip


@triton.jit
def _advance(x_r, x_i, y_r, y_i, delta, eta):
    """(x, y) -> (y, alpha y - x) with alpha = delta - i eta: one site of the theta recursion."""
    return y_r, y_i, (eta * y_i - x_r) + delta * y_r, (-eta * y_r - x_i) + delta * y_i


@triton.jit
def _load_map(maps, slot, heads, head, live):
    """The Moebius map of a slot: images of (0, 1) and (1, 0), each (x, y); the identity where not `live`."""
    at = maps + slot.to(tl.int64) * (8 * heads) + head
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + heads, mask=live, other=0.0),
        tl.load(at + 2 * heads, mask=live, other=1.0),
        tl.load(at + 3 * heads, mask=live, other=0.0),
        tl.load(at + 4 * heads, mask=live, other=1.0),
        tl.load(at + 5 * heads, mask=live, other=0.0),
        tl.load(at + 6 * heads, mask=live, other=0.0),
        tl.load(at + 7 * heads, mask=live, other=0.0),
    )


@triton.jit
def _store_map(maps, slot, heads, head, live, state):
    at = maps + slot.to(tl.int64) * (8 * heads) + head
    for k in tl.static_range(8):
        tl.store(at + k * heads, state[k], mask=live)


@triton.jit
def _forgets(after):
    """Whether a map is constant. Its second image is then exactly zero, which no sites and no rounding bring about."""
    return (after[4] == 0.0) & (after[5] == 0.0) & (after[6] == 0.0) & (after[7] == 0.0)


@triton.jit
def _image(after, x_r, x_i, y_r, y_i):
    """The map `after` of the vector (x, y); of a constant map its constant, even if the vector is NaN."""
    constant = _forgets(after)
    r = y_r * after[0] - y_i * after[1] + (x_r * after[4] - x_i * after[5])
    i = y_r * after[1] + y_i * after[0] + (x_r * after[5] + x_i * after[4])
    s = y_r * after[2] - y_i * after[3] + (x_r * after[6] - x_i * after[7])
    j = y_r * after[3] + y_i * after[2] + (x_r * after[7] + x_i * after[6])
    return (
        tl.where(constant, after[0], r), tl.where(constant, after[1], i),
        tl.where(constant, after[2], s), tl.where(constant, after[3], j),
    )  # fmt: skip


@triton.jit
def _composed(before, after):
    """First `before`, then `after`."""
    constant = _forgets(after)
    first = _image(after, before[0], before[1], before[2], before[3])
    second = _image(after, before[4], before[5], before[6], before[7])
    return (
        first[0], first[1], first[2], first[3],
        tl.where(constant, 0.0, second[0]), tl.where(constant, 0.0, second[1]),
        tl.where(constant, 0.0, second[2]), tl.where(constant, 0.0, second[3]),
    )  # fmt: skip


@triton.jit
def _log_of(x):
    """Natural logarithm of a power of two."""
    return ((x.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.float64) * 0.6931471805599453


@_kernel
def compose_kernel(
    maps, log_scale, detuning, absorption, detuning_stride, absorption_stride, scale, energy, bias, floor,
    initial_real, initial_imag, initial_stride, cu_seqlens, rows, row_length, search, chunk, slots, heads,
    KIND: tl.constexpr, LEAD: tl.constexpr, PACKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Moebius map of every slot in float64; of a row's first slot the constant map to its last m.

    With a `log_scale` maps of the sites alone, and the logs of what their entries were divided by.
    """
    slot, head, row, start, sites, first, _ = _place(
        cu_seqlens, rows, row_length, search, chunk, slots, heads, PACKED, LANES
    )
    live = slot < slots
    if log_scale is not None:
        first = slot < 0  # no row begins: every map is that of its sites
    scale = _head_parameter(scale, head, live, KIND)
    energy = _head_parameter(energy, head, live, KIND)
    bias = _head_parameter(bias, head, live, KIND)
    m_r, m_i = _initial(initial_real, initial_imag, initial_stride, row, head, first, energy, bias, floor, LEAD)
    zero = tl.zeros_like(head).to(tl.float64)
    other = tl.where(first, zero, 1.0)
    state = (
        tl.where(first, m_r.to(tl.float64), 0.0), tl.where(first, m_i.to(tl.float64), 0.0), zero + 1.0, zero,
        other, zero, zero, zero,
    )  # fmt: skip
    detuning = _at(detuning, start, detuning_stride, head)
    absorption = _at(absorption, start, absorption_stride, head)
    divided = zero
    for t in range(0, tl.max(sites, 0), _SITES):
        # Sites past the end of a row change a map that, without scales, nothing reads: the next slot begins a row.
        a = _tile(detuning, t, detuning_stride, sites - t, 0.0)
        e = _tile(absorption, t, absorption_stride, sites - t, 1.0)
        for j in tl.static_range(_SITES):
            delta, eta = _medium(a[j], e[j], scale, energy, bias, floor, KIND)
            delta, eta = delta.to(tl.float64), eta.to(tl.float64)
            one = _advance(state[0], state[1], state[2], state[3], delta, eta)
            two = _advance(state[4], state[5], state[6], state[7], delta, eta)
            if log_scale is None:
                state = (one[0], one[1], one[2], one[3], two[0], two[1], two[2], two[3])
            else:
                inside = t + j < sites
                state = (
                    tl.where(inside, one[0], state[0]), tl.where(inside, one[1], state[1]),
                    tl.where(inside, one[2], state[2]), tl.where(inside, one[3], state[3]),
                    tl.where(inside, two[0], state[4]), tl.where(inside, two[1], state[5]),
                    tl.where(inside, two[2], state[6]), tl.where(inside, two[3], state[7]),
                )  # fmt: skip
        divided -= _log_of(_scale_of(state[2], state[3]))
        state = _rescaled(state)
    if log_scale is not None:
        tl.store(log_scale + slot.to(tl.int64) * heads + head, divided, mask=live)
    empty = sites == 0
    _store_map(
        maps, slot, heads, head, live,
        (
            tl.where(empty, 0.0, state[0]), tl.where(empty, 0.0, state[1]),
            tl.where(empty, 1.0, state[2]), tl.where(empty, 0.0, state[3]),
            tl.where(empty, 1.0, state[4]), tl.where(empty, 0.0, state[5]),
            tl.where(empty, 0.0, state[6]), tl.where(empty, 0.0, state[7]),
        ),
    )  # fmt: skip


@_kernel
def fold_kernel(
    folded, folded_scale, maps, log_scale, stretches, groups, heads, lanes, GROUP: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Moebius map of every group of a row's neighbouring stretches, and the log of what its entries were divided by."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < lanes
    head, place = lane % heads, lane // heads
    row, group = place // groups, place % groups
    zero = tl.zeros_like(lane).to(tl.float64)
    whole = (zero, zero, zero + 1.0, zero, zero + 1.0, zero, zero, zero)
    divided = zero
    for s in range(0, GROUP):
        stretch = group * GROUP + s
        inside = live & (stretch < stretches)
        slot = row * stretches + stretch
        whole = _composed(whole, _load_map(maps, slot, heads, head, inside))
        divided += tl.load(log_scale + slot.to(tl.int64) * heads + head, mask=inside, other=0.0)
        divided -= _log_of(_scale_of(whole[2], whole[3]))
        whole = _rescaled(whole)
    _store_map(folded, place, heads, head, live, whole)
    tl.store(folded_scale + place.to(tl.int64) * heads + head, divided, mask=live)


@_kernel
def carry_kernel(
    carried, group_maps, maps, slots, heads, per_group, GROUPS: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Vector (x, y), m = x / y, before every slot: compose within groups, across groups, then walk each group."""
    lane = tl.arange(0, GROUPS * HEADS)
    group = lane // HEADS
    head = tl.program_id(0) * HEADS + lane % HEADS
    live = head < heads
    nothing = tl.zeros_like(head) < 0
    whole = _load_map(maps, group, heads, head, nothing)
    for s in range(0, per_group, _SITES):
        for j in tl.static_range(_SITES):
            slot = group * per_group + s + j
            inside = live & (s + j < per_group) & (slot < slots)
            whole = _composed(whole, _load_map(maps, slot, heads, head, inside))
        whole = _rescaled(whole)
    _store_map(group_maps, group, heads, head, live, whole)
    tl.debug_barrier()  # every lane now reads what the others of this program wrote
    zero = tl.zeros_like(head).to(tl.float64)
    v = (zero, zero, zero + 1.0, zero)
    for g in range(0, GROUPS, _SITES):
        for j in tl.static_range(_SITES):
            earlier = tl.zeros_like(group) + (g + j)
            v = _image(_load_map(group_maps, earlier, heads, head, live & (earlier < group)), v[0], v[1], v[2], v[3])
        by = _scale_of(v[2], v[3])
        v = (v[0] * by, v[1] * by, v[2] * by, v[3] * by)
    for s in range(0, per_group, _SITES):
        slot = group * per_group + s
        last = tl.minimum((group + 1) * per_group, slots)
        tile = (
            _load_map(maps, slot, heads, head, live & (slot < last)),
            _load_map(maps, slot + 1, heads, head, live & (slot + 1 < last)),
            _load_map(maps, slot + 2, heads, head, live & (slot + 2 < last)),
            _load_map(maps, slot + 3, heads, head, live & (slot + 3 < last)),
        )
        for j in tl.static_range(_SITES):
            at = carried + (slot + j).to(tl.int64) * (4 * heads) + head
            for k in tl.static_range(4):
                tl.store(at + k * heads, v[k], mask=live & (slot + j < last))
            v = _image(tile[j], v[0], v[1], v[2], v[3])
        by = _scale_of(v[2], v[3])
        v = (v[0] * by, v[1] * by, v[2] * by, v[3] * by)


@_kernel
def apply_kernel(
    log_decay, weight, m_real, m_imag, state_real, state_imag, carried,
    detuning, absorption, source, detuning_stride, absorption_stride, source_stride,
    scale, energy, bias, source_bias, floor,
    initial_real, initial_imag, initial_stride, cu_seqlens, rows, row_length, search, chunk, slots, heads,
    KIND: tl.constexpr, LEAD: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sweep inside every slot in float32 from its carried m, and what the gates make of it."""
    slot, head, row, start, sites, first, last = _place(
        cu_seqlens, rows, row_length, search, chunk, slots, heads, PACKED, LANES
    )
    live = slot < slots
    scale = _head_parameter(scale, head, live, KIND)
    energy = _head_parameter(energy, head, live, KIND)
    bias = _head_parameter(bias, head, live, KIND)
    source_bias = _head_parameter(source_bias, head, live, KIND)
    m_r, m_i = _initial(initial_real, initial_imag, initial_stride, row, head, first, energy, bias, floor, LEAD)
    if carried is not None:
        vector = carried + slot.to(tl.int64) * (4 * heads) + head
        x_r = tl.load(vector, mask=live, other=0.0)
        x_i = tl.load(vector + heads, mask=live, other=0.0)
        y_r = tl.load(vector + 2 * heads, mask=live, other=1.0)
        y_i = tl.load(vector + 3 * heads, mask=live, other=0.0)
        square = y_r * y_r + y_i * y_i
        m_r = tl.where(first, m_r, ((x_r * y_r + x_i * y_i) / square).to(tl.float32))
        m_i = tl.where(first, m_i, ((x_i * y_r - x_r * y_i) / square).to(tl.float32))
    detuning = _at(detuning, start, detuning_stride, head)
    absorption = _at(absorption, start, absorption_stride, head)
    if KIND == "gated" or KIND == "free":
        source = _at(source, start, source_stride, head)
    if KIND != "plain":
        log_decay, weight = _at(log_decay, start, heads, head), _at(weight, start, heads, head)
    if SAVE:
        m_real, m_imag = _at(m_real, start, heads, head), _at(m_imag, start, heads, head)
    for t in range(0, tl.max(sites, 0), _SITES):
        a = _tile(detuning, t, detuning_stride, sites - t, 0.0)
        e = _tile(absorption, t, absorption_stride, sites - t, 1.0)
        if KIND == "gated" or KIND == "free":
            s = _tile(source, t, source_stride, sites - t, 0.0)
        for j in tl.static_range(_SITES):
            inside = t + j < sites
            at = (t + j) * heads
            delta, eta = _medium(a[j], e[j], scale, energy, bias, floor, KIND)
            if KIND != "plain":
                decay, b = _flux(m_i, eta)
                if KIND == "gated":
                    b = b * _sigmoid(s[j] + source_bias)
                if KIND == "free":
                    b = _softplus(s[j] + source_bias)[0]
                tl.store(log_decay + at, decay, mask=inside)
                tl.store(weight + at, b, mask=inside)
            d_r, d_i = delta - m_r, eta + m_i
            inverse = _inverse(d_r * d_r + d_i * d_i)
            m_r = tl.where(inside, d_r * inverse, m_r)
            m_i = tl.where(inside, d_i * inverse, m_i)
            if SAVE:
                tl.store(m_real + at, m_r, mask=inside)
                tl.store(m_imag + at, m_i, mask=inside)
    if KIND != "plain":
        tl.store(state_real + row * heads + head, m_r, mask=last)
        tl.store(state_imag + row * heads + head, m_i, mask=last)


@_kernel
def adjoint_compose_kernel(
    maps, m_real, m_imag, grad_one, grad_two, grad_state_real, grad_state_imag,
    absorption, source, absorption_stride, source_stride, energy, bias, source_bias, floor,
    initial_real, initial_imag, initial_stride, cu_seqlens, rows, row_length, search, chunk, slots, heads,
    KIND: tl.constexpr, LEAD: tl.constexpr, PACKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Affine map total + product * cotangent of every slot, in float64; see DERIVATION.md, "Adjoint"."""
    slot, head, row, start, sites, first, last = _place(
        cu_seqlens, rows, row_length, search, chunk, slots, heads, PACKED, LANES
    )
    live = slot < slots
    energy = _head_parameter(energy, head, live, KIND)
    bias = _head_parameter(bias, head, live, KIND)
    source_bias = _head_parameter(source_bias, head, live, KIND)
    _, first_i = _initial(initial_real, initial_imag, initial_stride, row, head, first, energy, bias, floor, LEAD)
    total_r = tl.zeros_like(head).to(tl.float64)
    total_i = total_r
    product_r, product_i = total_r + 1.0, total_r
    if grad_state_real is not None:
        total_r += tl.load(grad_state_real + row * heads + head, mask=last, other=0.0).to(tl.float64)
        total_i += tl.load(grad_state_imag + row * heads + head, mask=last, other=0.0).to(tl.float64)
    end = start + sites - 1
    m_real, m_imag = _at(m_real, end, heads, head), _at(m_imag, end, heads, head)
    grad_one, grad_two = _at(grad_one, end, heads, head), _at(grad_two, end, heads, head)
    if KIND != "plain":
        absorption = _at(absorption, end, absorption_stride, head)
    if KIND == "gated" or KIND == "free":
        source = _at(source, end, source_stride, head)
    for t in range(0, tl.max(sites, 0), _SITES):
        # Sites past the start of a slot multiply by m = 1 and add nothing.
        real = _tile(m_real, t, -heads, sites - t, 1.0)
        imag = _tile(m_imag, t, -heads, sites - t, 0.0)
        one = _tile(grad_one, t, -heads, sites - t, 0.0)
        two = _tile(grad_two, t, -heads, sites - t, 0.0)
        if KIND != "plain":
            before = _tile(m_imag, t + 1, -heads, sites - t - first.to(tl.int32), 1.0)
            e = _tile(absorption, t, -absorption_stride, sites - t, 0.0)
        s = one
        if KIND == "gated" or KIND == "free":
            s = _tile(source, t, -source_stride, sites - t, 0.0)
        for j in tl.static_range(_SITES):
            if KIND == "plain":
                total_r += one[j].to(tl.float64)
                total_i += two[j].to(tl.float64)
            m_r, m_i = real[j].to(tl.float64), imag[j].to(tl.float64)
            c_r, c_i = m_r * m_r - m_i * m_i, 2.0 * m_r * m_i
            total_r, total_i = c_r * total_r + c_i * total_i, c_r * total_i - c_i * total_r
            product_r, product_i = c_r * product_r + c_i * product_i, c_r * product_i - c_i * product_r
            if KIND != "plain":
                u = tl.where(first & (t + j == sites - 1), first_i, before[j])
                d_u, _, _, _ = _pull_gates(u, e[j], s[j], one[j], two[j], bias, source_bias, floor, KIND)
                total_i += d_u.to(tl.float64)
    # Nothing flows from a row's first site to the row before it.
    at = maps + slot.to(tl.int64) * (4 * heads) + head
    tl.store(at, tl.where(first, 0.0, total_r), mask=live)
    tl.store(at + heads, tl.where(first, 0.0, total_i), mask=live)
    tl.store(at + 2 * heads, tl.where(first, 0.0, product_r), mask=live)
    tl.store(at + 3 * heads, tl.where(first, 0.0, product_i), mask=live)


@triton.jit
def _load_affine(maps, slot, heads, head, live):
    """Total and product of a slot, each a complex number; the identity where not `live`."""
    at = maps + slot.to(tl.int64) * (4 * heads) + head
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + heads, mask=live, other=0.0),
        tl.load(at + 2 * heads, mask=live, other=1.0),
        tl.load(at + 3 * heads, mask=live, other=0.0),
    )


@triton.jit
def _affine(after, x_r, x_i):
    """Image total + product * x; the total of a constant map even if x is NaN."""
    constant = (after[2] == 0.0) & (after[3] == 0.0)
    r = after[0] + (after[2] * x_r - after[3] * x_i)
    i = after[1] + (after[2] * x_i + after[3] * x_r)
    return tl.where(constant, after[0], r), tl.where(constant, after[1], i)


@_kernel
def adjoint_carry_kernel(
    carried, group_maps, maps, slots, heads, per_group, GROUPS: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Cotangent of m behind every slot; as `carry_kernel`, from the last slot to the first."""
    lane = tl.arange(0, GROUPS * HEADS)
    group = lane // HEADS  # counted from the end
    head = tl.program_id(0) * HEADS + lane % HEADS
    live = head < heads
    zero = tl.zeros_like(head).to(tl.float64)
    whole = (zero, zero, zero + 1.0, zero)
    newest = slots - 1 - group * per_group
    for s in range(0, per_group, _SITES):
        for j in tl.static_range(_SITES):
            inside = live & (s + j < per_group) & (newest - s - j >= 0)
            after = _load_affine(maps, newest - s - j, heads, head, inside)
            total = _affine(after, whole[0], whole[1])
            product = (after[2] * whole[2] - after[3] * whole[3], after[2] * whole[3] + after[3] * whole[2])
            constant = (after[2] == 0.0) & (after[3] == 0.0)
            whole = (
                total[0], total[1], tl.where(constant, 0.0, product[0]), tl.where(constant, 0.0, product[1])
            )  # fmt: skip
    at = group_maps + group.to(tl.int64) * (4 * heads) + head
    for k in tl.static_range(4):
        tl.store(at + k * heads, whole[k], mask=live)
    tl.debug_barrier()  # every lane now reads what the others of this program wrote
    v = (zero, zero)
    for g in range(0, GROUPS, _SITES):
        for j in tl.static_range(_SITES):
            later = tl.zeros_like(group) + (g + j)
            v = _affine(_load_affine(group_maps, later, heads, head, live & (later < group)), v[0], v[1])
    for s in range(0, per_group, _SITES):
        slot = newest - s
        end = tl.maximum(newest - per_group, -1)
        tile = (
            _load_affine(maps, slot, heads, head, live & (slot > end)),
            _load_affine(maps, slot - 1, heads, head, live & (slot - 1 > end)),
            _load_affine(maps, slot - 2, heads, head, live & (slot - 2 > end)),
            _load_affine(maps, slot - 3, heads, head, live & (slot - 3 > end)),
        )
        for j in tl.static_range(_SITES):
            at = carried + (slot - j).to(tl.int64) * (2 * heads) + head
            tl.store(at, v[0], mask=live & (slot - j > end))
            tl.store(at + heads, v[1], mask=live & (slot - j > end))
            v = _affine(tile[j], v[0], v[1])


@_kernel
def adjoint_apply_kernel(
    d_detuning, d_absorption, d_source, d_parameters, d_initial_real, d_initial_imag, carried,
    m_real, m_imag, grad_one, grad_two, grad_state_real, grad_state_imag,
    detuning, absorption, source, detuning_stride, absorption_stride, source_stride,
    scale, energy, bias, source_bias, floor,
    initial_real, initial_imag, initial_stride, cu_seqlens, rows, row_length, search, chunk, slots, heads,
    KIND: tl.constexpr, LEAD: tl.constexpr, PACKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of both inputs of every site, and each slot's part of those of the per-head parameters."""
    slot, head, row, start, sites, first, last = _place(
        cu_seqlens, rows, row_length, search, chunk, slots, heads, PACKED, LANES
    )
    live = slot < slots
    scale = _head_parameter(scale, head, live, KIND)
    energy = _head_parameter(energy, head, live, KIND)
    bias = _head_parameter(bias, head, live, KIND)
    source_bias = _head_parameter(source_bias, head, live, KIND)
    _, first_i = _initial(initial_real, initial_imag, initial_stride, row, head, first, energy, bias, floor, LEAD)
    g_r = tl.zeros_like(head).to(tl.float32)
    g_i = g_r
    if grad_state_real is not None:
        g_r += tl.load(grad_state_real + row * heads + head, mask=last, other=0.0)
        g_i += tl.load(grad_state_imag + row * heads + head, mask=last, other=0.0)
    if carried is not None:
        # Behind the end of a row the carried cotangent is zero: the next row's first slot lets nothing through.
        behind = carried + slot.to(tl.int64) * (2 * heads) + head
        g_r += tl.load(behind, mask=live & (sites > 0), other=0.0).to(tl.float32)
        g_i += tl.load(behind + heads, mask=live & (sites > 0), other=0.0).to(tl.float32)
    d_scale = tl.zeros_like(head).to(tl.float32)
    d_energy, d_bias, d_source_bias = d_scale, d_scale, d_scale
    end = start + sites - 1
    m_real, m_imag = _at(m_real, end, heads, head), _at(m_imag, end, heads, head)
    grad_one, grad_two = _at(grad_one, end, heads, head), _at(grad_two, end, heads, head)
    d_detuning, d_absorption = _at(d_detuning, end, heads, head), _at(d_absorption, end, heads, head)
    if KIND != "plain":
        detuning = _at(detuning, end, detuning_stride, head)
        absorption = _at(absorption, end, absorption_stride, head)
    if KIND == "gated" or KIND == "free":
        source, d_source = _at(source, end, source_stride, head), _at(d_source, end, heads, head)
    for t in range(0, tl.max(sites, 0), _SITES):
        real = _tile(m_real, t, -heads, sites - t, 1.0)
        imag = _tile(m_imag, t, -heads, sites - t, 0.0)
        one = _tile(grad_one, t, -heads, sites - t, 0.0)
        two = _tile(grad_two, t, -heads, sites - t, 0.0)
        if KIND != "plain":
            before = _tile(m_imag, t + 1, -heads, sites - t - first.to(tl.int32), 1.0)
            a = _tile(detuning, t, -detuning_stride, sites - t, 0.0)
            e = _tile(absorption, t, -absorption_stride, sites - t, 0.0)
        s = one
        if KIND == "gated" or KIND == "free":
            s = _tile(source, t, -source_stride, sites - t, 0.0)
        for j in tl.static_range(_SITES):
            inside = t + j < sites
            at = -(t + j) * heads
            if KIND == "plain":
                g_r += one[j]
                g_i += two[j]
            c_r, c_i = real[j] * real[j] - imag[j] * imag[j], 2.0 * real[j] * imag[j]
            g_r, g_i = c_r * g_r + c_i * g_i, c_r * g_i - c_i * g_r
            d_delta, d_eta = tl.where(inside, -g_r, 0.0), tl.where(inside, g_i, 0.0)
            if KIND == "plain":
                tl.store(d_detuning + at, d_delta, mask=inside)
                tl.store(d_absorption + at, d_eta, mask=inside)
            else:
                u = tl.where(first & (t + j == sites - 1), first_i, before[j])
                d_u, through, d_s, slope = _pull_gates(
                    u, e[j], s[j], one[j], two[j], bias, source_bias, floor, KIND
                )  # fmt: skip
                g_i += d_u
                d_eta = (d_eta + through) * slope
                d_scale += d_delta * a[j]
                d_energy -= d_delta
                d_bias += d_eta
                tl.store(d_detuning + at, (d_delta * scale).to(d_detuning.dtype.element_ty), mask=inside)
                tl.store(d_absorption + at, d_eta.to(d_absorption.dtype.element_ty), mask=inside)
                if KIND == "gated" or KIND == "free":
                    d_source_bias += d_s
                    tl.store(d_source + at, d_s.to(d_source.dtype.element_ty), mask=inside)
    if LEAD:
        # m_0 depends on alpha = -energy - i eta of the bias alone; a cotangent pulls back by the conjugate slope.
        _, _, slope_r, slope_i = _free_root(energy, _softplus(bias)[0] + floor)
        d_energy -= tl.where(first, slope_r * g_r + slope_i * g_i, 0.0)
        d_bias -= tl.where(first, slope_r * g_i - slope_i * g_r, 0.0) * _sigmoid(bias)
    else:
        tl.store(d_initial_real + row * heads + head, g_r, mask=first)
        tl.store(d_initial_imag + row * heads + head, g_i, mask=first)
    if KIND != "plain":
        part = d_parameters + slot.to(tl.int64) * (4 * heads) + head
        tl.store(part, d_scale, mask=live)
        tl.store(part + heads, d_energy, mask=live)
        tl.store(part + 2 * heads, d_bias, mask=live)
        tl.store(part + 3 * heads, d_source_bias, mask=live)
