"""The causal mixer: decays from the half-line Green function, tokens mixed by a gated semiseparable matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.errors import ShapeError
from resnet_bk.layers.mixer_state import InPlaceState, MixerState
from resnet_bk.layers.phases import peierls_angles, running_sum
from resnet_bk.layers.positional import PositionalPotential
from resnet_bk.ops.context import Segment, entering_green, entering_last, entering_memory
from resnet_bk.ops.dispatch import choose_backend, compute_dtype
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.key_shift import shift_keys
from resnet_bk.ops.mixer_step import StepParameters, mixer_step, mixer_step_
from resnet_bk.ops.resolvent import (
    GreenState,
    causal_resolvent,
    decaying_root,
    flux_gate,
    flux_gates,
    previous_imag,
    scattering_phase,
    semiclassical_root,
)
from resnet_bk.ops.semiseparable import (
    MixState,
    has_tiles,
    rotary_frequencies,
    rotate,
    semiseparable_mix,
    semiseparable_step,
)

if TYPE_CHECKING:
    from resnet_bk.models.config import ModelConfig


class Gates(NamedTuple):
    """What the medium decides for every token and head, float32 or wider, each [batch, time, heads]."""

    log_decay: Tensor
    source: Tensor
    readout: Tensor | None = None
    """Weight of the mixed output (green kernel only)."""
    angle: Tensor | None = None
    """Extra rotation of queries and keys in radians [batch, time, heads, 1 or pairs]; None is none."""
    green: Tensor | None = None
    """Green function after each token as channels of the output [batch, time, 2 heads] (green readout only)."""


class Mixer(nn.Module):
    """Token mixing by the causal resolvent; the equations are those of docs/mathematics, section "The mixer".

    Args:
        config: sizes and switches; see `ModelConfig`.
    """

    state_class = MixerState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, inner, state = config.num_heads, config.inner_dim, config.state_size
        has_potential, has_source = config.dynamics != "decay_only", config.source != "unit"
        potentials = heads * config.sites_per_token * has_potential
        self.sizes = [inner, inner, state, state, potentials, heads, heads * has_source]
        if config.peierls_pairs:
            self.sizes.append(config.peierls_pairs)
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(inner + 2 * heads * config.green_readout, config.d_model, bias=False)
        self.query_bias = nn.Parameter(torch.empty(heads, state))
        self.key_bias = nn.Parameter(torch.empty(heads, state))
        self.absorption_bias = nn.Parameter(torch.empty(heads))
        if has_source:
            self.source_bias = nn.Parameter(torch.empty(heads))
        if has_potential:
            self.potential_scale = nn.Parameter(torch.empty(heads))
            self.energy = nn.Parameter(torch.empty(heads))
        self._position_potential = None
        if config.position_potential != "none":
            self._position_potential = PositionalPotential(config.position_potential, config.position_epsilon)
            self.position_scale = nn.Parameter(torch.empty(heads))
        if config.phase_coupling:
            self.phase_scale = nn.Parameter(torch.empty(heads))
        self.key_shift = nn.Parameter(torch.empty(state)) if config.key_shift else None
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the per-head parameters to their start; matrices are set by the model.

        The absorptions start log-uniform in [`absorption_start`, `absorption_stop`] above the floor, in an order
        unrelated to that of the energies; the potential starts switched off unless `potential_start` says otherwise, so
        that training starts from a quiet medium.
        """
        config = self.config
        heads = self.skip.numel()
        place = torch.arange(heads, dtype=torch.float64)
        golden = (0.5 + place * (math.sqrt(5) - 1) / 2) % 1
        low, high = math.log10(config.absorption_start), math.log10(config.absorption_stop)
        absorption = 10 ** (low + (high - low) * golden)
        self.absorption_bias.copy_(_inverse_softplus(absorption))
        if config.source != "unit":
            # Half of what theorem 8 allows in a medium at rest, for "free" too: it then learns as "gated" does.
            most = torch.sqrt(-torch.expm1(-2 * torch.asinh((absorption + config.absorption_floor) / 2)))
            free = _inverse_softplus(0.5 * most if config.kernel != "green" else torch.full_like(most, 0.5))
            self.source_bias.copy_(free if config.source == "free" else torch.zeros(heads))
        for ones in (self.query_bias, self.key_bias, self.norm_weight):
            ones.fill_(1.0)
        self.skip.fill_(config.skip_start)
        if config.dynamics != "decay_only":
            self.potential_scale.fill_(config.potential_start)
            reach = config.energy_range
            if config.sites_per_token == 3:
                self.energy.copy_(1 - 2 * (place % 2))
            else:
                self.energy.copy_(torch.linspace(-reach, reach, heads) if heads > 1 else torch.zeros(1))
        if config.position_potential != "none":
            self.position_scale.fill_(1.0)
        if config.phase_coupling:
            self.phase_scale.zero_()
        if self.key_shift is not None:
            self.key_shift.zero_()

    def forward(
        self,
        u: Float[Tensor, "batch time d_model"],
        state: MixerState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
        segment: Segment | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], MixerState]:
        """Mixed tokens and the state that continues them (one row a document with `cu_seqlens`).

        A single token that continues a state takes one kernel where there is a GPU and no gradient. With a `segment`,
        `state` is the one before the whole sequence that ranks share, and the state returned continues this segment.
        """
        projection = self.in_proj(u)
        if (
            state is not None
            and segment is None
            and (isinstance(state, InPlaceState) or self._steps(projection, state, cu_seqlens))
        ):
            out, after = self.step(projection, state)
            return self.out_proj(out).unsqueeze(1), after
        out, after = self.core(projection, state, cu_seqlens, segment)
        return self.out_proj(out), after

    @property
    def fused_step(self) -> bool:
        """Whether `step` knows the options: exact dynamics, flux kernel, one site, normed heads, no Peierls phases."""
        return self._fused_gates and self.config.head_norm and not self.config.peierls_pairs

    @property
    def _fused_gates(self) -> bool:
        """Whether `flux_gates` knows this mixer's medium."""
        config = self.config
        plain = config.sites_per_token == 1 and not config.phase_coupling and not config.green_readout
        plain = plain and config.position_potential == "none"
        return config.dynamics == "exact" and config.kernel == "flux" and plain

    @property
    def step_parameters(self) -> StepParameters:
        """The parameters of what lies between the two projections, with the options that `fused_step` asks for."""
        return StepParameters(
            self.query_bias,
            self.key_bias,
            self.absorption_bias,
            self.potential_scale,
            self.energy,
            self.skip,
            None if self.config.source == "unit" else self.source_bias,
            self.norm_weight,
            self.key_shift,
        )

    def _core_options(self, state: MixerState | None) -> dict[str, Any]:
        config = self.config
        return {
            "previous": None if state is None else state.key,
            "source": config.source,
            "absorption_floor": config.absorption_floor,
            "rotary_base": config.rotary_base,
            "rotary_fraction": config.rotary_fraction,
            "epsilon": config.norm_epsilon,
        }

    def core(
        self,
        projection: Float[Tensor, "batch time width"],
        state: MixerState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
        segment: Segment | None = None,
    ) -> tuple[Float[Tensor, "batch time inner"], MixerState]:
        """What happens between the two projections: one operator on a GPU, if `fused_step` knows the options.

        With a `segment` always several: the state before its mixing is known only after its gates.
        """
        config = self.config
        on_gpu = self.fused_step and segment is None and choose_backend("auto", projection) == "triton"
        if on_gpu and has_tiles(config.state_size, config.head_dim):
            from resnet_bk.ops.mixer_core import mixer_core

            memory, green = None if state is None else state.mix, self._initial_green(state)
            options = self._core_options(state)
            out, mix, green, key = mixer_core(
                projection, self.step_parameters, memory, green, cu_seqlens=cu_seqlens, **options
            )
            return out, MixerState(mix, green, key=key)
        gate, *operands = projection.split(self.sizes, dim=-1)
        y, gates, after = self.mix(*operands, state=state, cu_seqlens=cu_seqlens, segment=segment)
        if config.head_norm:
            out = gated_norm(y, gate, self.norm_weight, epsilon=config.norm_epsilon)
        else:
            out = y.flatten(2) * (F.silu(gate) * self.norm_weight.to(gate.dtype))
        if gates.green is not None:
            out = torch.cat((out, gates.green.to(out.dtype)), dim=-1)
        return out, after

    def _initial_green(self, state: MixerState | None) -> GreenState | None:
        """M before the first token: the state's, that of a wall, or None for the lead."""
        if state is not None and state.green is not None:
            return state.green
        if self.config.boundary == "lead":
            return None
        return self.lead(torch.float32)

    def _steps(self, projection: Tensor, state: MixerState, cu_seqlens: Tensor | None) -> bool:
        """Whether `step` runs as one kernel on these tokens."""
        single = projection.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
        return single and self.fused_step and choose_backend("auto", projection) == "triton" and state.green is not None

    def step(
        self, projection: Float[Tensor, "batch 1 width"], state: MixerState
    ) -> tuple[Float[Tensor, "batch inner"], MixerState]:
        """One token between the two projections, and the state after it; an `InPlaceState` is overwritten.

        Raises:
            ShapeError: more than one token, or a state without a Green function.
        """
        if projection.shape[1] != 1 or state.green is None:
            held = "no Green function" if state.green is None else "a Green function"
            raise ShapeError(
                f"A step takes one token and a state with a Green function; got {projection.shape[1]} and {held}."
            )
        token, options = projection[:, 0], self._core_options(state)
        start = 2 * self.config.inner_dim
        key = token[:, start : start + self.config.state_size]
        if isinstance(state, InPlaceState):
            out = mixer_step_(token, self.step_parameters, state.mix, state.green, **options)
            if state.key is not None:
                state.key.copy_(key)
            return out, state
        out, mix, green = mixer_step(token, self.step_parameters, state.mix, state.green, **options)
        return out, MixerState(mix, green, key=None if state.key is None else key.to(state.key.dtype))

    def mix(
        self,
        x: Float[Tensor, "batch time inner"],
        key: Float[Tensor, "batch time state"],
        query: Float[Tensor, "batch time state"],
        potential: Float[Tensor, "batch time sites*heads"],
        absorption: Float[Tensor, "batch time heads"],
        source: Float[Tensor, "batch time heads"],
        turn: Float[Tensor, "batch time pairs"] | None = None,
        *,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        segment: Segment | None = None,
    ) -> tuple[Float[Tensor, "batch time heads value"], Gates, MixerState]:
        """Mixed values, what mixed them, and the state: all between the two projections but for norm and output gate.

        Arguments are the raw projections; `turn` is there exactly if the mixer has Peierls phases.
        """
        gates, green, free, phase = self.gates(potential, absorption, source, state, cu_seqlens, segment)
        peierls = None
        if turn is not None:
            before, pairs = None if state is None else state.peierls, self.config.state_size // 2
            angle, peierls = peierls_angles(turn, gates.source, pairs, before, cu_seqlens, segment)
            gates = gates._replace(angle=angle if gates.angle is None else angle + gates.angle)
        last = None
        if self.key_shift is not None:
            before = None if state is None else state.key
            if segment is not None:
                before = entering_last(key[:, -1].to(compute_dtype(key)), segment, first=before)
            key, last = shift_keys(key, self.key_shift, before, cu_seqlens)
        y, mix = self._mixed(x, key, query, gates, state, cu_seqlens, segment)
        return y, gates, MixerState(mix, green, free, phase, peierls, last)

    def _mixed(
        self,
        x: Tensor,
        key: Tensor,
        query: Tensor,
        gates: Gates,
        state: MixerState | None,
        cu_seqlens: Tensor | None,
        segment: Segment | None,
    ) -> tuple[Float[Tensor, "batch time heads value"], MixState]:
        """Values mixed under these gates, and the memory after the last token."""
        config = self.config
        initial = None if state is None else state.mix
        single = x.shape[1] == 1 and initial is not None and cu_seqlens is None and not torch.is_grad_enabled()
        single = single and segment is None
        x = x.unflatten(-1, (config.num_heads, config.head_dim))
        biases = {"query_bias": self.query_bias, "key_bias": self.key_bias}
        norm: dict[str, float | None] = {"norm_epsilon": config.norm_epsilon}
        if single or gates.angle is not None:
            query, key = (F.rms_norm(part, (config.state_size,), eps=config.norm_epsilon) for part in (query, key))
            norm = {}
        if gates.angle is not None:
            cos, sin = gates.angle.cos(), gates.angle.sin()
            query = rotate(query.unsqueeze(2) + self.query_bias, cos, sin)
            key = rotate(key.unsqueeze(2) + self.key_bias, cos, sin)
            biases = {}
        options = {
            **biases,
            "frequencies": rotary_frequencies(
                config.state_size, config.rotary_base, config.rotary_fraction, device=x.device
            ),
            "skip": None if gates.readout is not None else self.skip,
            "scale": config.state_size**-0.5,
        }
        if segment is not None:
            summed = {name: value for name, value in options.items() if name in ("key_bias", "frequencies")}
            initial = entering_memory(
                key, x, gates.log_decay, segment, source=gates.source, first=initial, **norm, **summed
            )
        if single and initial is not None:
            now = [part[:, 0] for part in (query, key, x, gates.log_decay, gates.source)]
            y, mix = semiseparable_step(now[0], now[1], now[2], now[3], initial, source=now[4], **options)
            y = y.unsqueeze(1)
        else:
            y, mix = semiseparable_mix(
                query,
                key,
                x,
                gates.log_decay,
                source=gates.source,
                initial=initial,
                cu_seqlens=cu_seqlens,
                **norm,
                **options,
            )
        if gates.readout is not None:
            y = (gates.readout[..., None] * y + self.skip[:, None] * x).to(x.dtype)
        return y, mix

    def gates(
        self,
        potential: Float[Tensor, "batch time sites*heads"],
        absorption: Float[Tensor, "batch time heads"],
        source: Float[Tensor, "batch time heads"],
        state: MixerState | None,
        cu_seqlens: Tensor | None,
        segment: Segment | None = None,
    ) -> tuple[Gates, GreenState | None, GreenState | None, Tensor | None]:
        """Decays, sources and phases of every token, and the scan states after the last one.

        Arguments are the raw projections a, e and s, empty where unused; gates are float32 whatever the model's dtype.
        """
        config = self.config
        if self._fused_gates:
            first = self._initial_green(state)
            if segment is not None:
                delta, per_site = self.medium(potential, absorption)
                first = self.lead(delta.dtype) if first is None else first
                first = entering_green(delta, per_site, segment, first=first)
            (log_decay, unit), green = flux_gates(
                potential,
                absorption,
                source,
                potential_scale=self.potential_scale,
                energy=self.energy,
                absorption_bias=self.absorption_bias,
                absorption_floor=config.absorption_floor,
                source_bias=None if config.source == "unit" else self.source_bias,
                source_kind=config.source,
                initial=first,
                cu_seqlens=cu_seqlens,
            )
            return Gates(log_decay, unit), green, None, None
        green = free = phase = angle = features = None
        delta, per_site = self.medium(potential, absorption, state, cu_seqlens, segment)
        sites, wide = config.sites_per_token, delta.dtype
        eta = per_site[:, ::sites]
        bounds = None if cu_seqlens is None else cu_seqlens * sites
        if config.dynamics == "decay_only":
            log_modulus = -torch.asinh(eta / 2)
            unit = torch.sqrt(-torch.expm1(2 * log_modulus))
            log_decay = log_modulus
        else:
            energy, lead = self.energy.to(wide), self.lead(wide)
            if config.dynamics == "exact":
                before = lead if state is None or state.green is None else state.green
                if segment is not None:
                    before = entering_green(delta, per_site, segment, first=before)
                m, green = causal_resolvent(delta, per_site, initial=before, cu_seqlens=bounds)
                log_flux, unit = flux_gate(previous_imag(m[1], before.imag, bounds), per_site)
                if sites > 1:
                    m = (m[0][:, sites - 1 :: sites], m[1][:, sites - 1 :: sites])
                    log_flux = log_flux.unflatten(1, (-1, sites)).sum(2)
                    unit = torch.sqrt(-torch.expm1(2 * log_flux))
                log_modulus = 0.5 * torch.log(m[0].square() + m[1].square())
                log_decay = log_flux if config.kernel == "flux" else log_modulus
                if config.green_readout:
                    features = self._cayley(*m)
            else:
                log_modulus, argument = semiclassical_root(delta, eta)
                unit = torch.sqrt(-torch.expm1(2 * log_modulus))
                log_decay = log_modulus
            if config.phase_coupling:
                if config.dynamics == "exact":
                    before = lead if state is None or state.free is None else state.free
                    quiet = (-energy).expand_as(eta)
                    if segment is not None:
                        before = entering_green(quiet, eta, segment, first=before)
                    m0, free = causal_resolvent(quiet, eta, initial=before, cu_seqlens=cu_seqlens)
                    turned = scattering_phase(m, m0)
                else:
                    turned = semiclassical_root((-energy).expand_as(eta), eta)[1] - argument
                total, phase = running_sum(turned, None if state is None else state.phase, cu_seqlens, segment)
                angle = torch.remainder(self.phase_scale.double() * total, 2 * math.pi).to(wide)[..., None]
        readout = None
        if config.kernel == "green":
            readout = torch.sqrt(2 * eta)
            unit = readout * torch.exp(log_modulus)
        if config.source != "unit":
            gate = source.to(wide) + self.source_bias.to(wide)
            if config.source == "gated":
                unit = unit * gate.sigmoid()
            else:  # the Green kernel keeps the weights that theorem 2 bounds it with
                unit = F.softplus(gate) * (unit if config.kernel == "green" else 1)
        return Gates(log_decay, unit, readout, angle, features), green, free, phase

    def medium(
        self,
        potential: Float[Tensor, "batch time sites*heads"],
        absorption: Float[Tensor, "batch time heads"],
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        segment: Segment | None = None,
    ) -> tuple[Float[Tensor, "batch all_sites heads"], Float[Tensor, "batch all_sites heads"]]:
        """Detuning (0 without a potential) and absorption of every site, float32 or wider, from the raw projections."""
        config = self.config
        wide = torch.float64 if absorption.dtype == torch.float64 else torch.float32
        sites = config.sites_per_token
        eta = F.softplus(absorption.to(wide) + self.absorption_bias.to(wide)) + config.absorption_floor
        eta = eta if sites == 1 else eta.repeat_interleave(sites, dim=1)
        if config.dynamics == "decay_only":
            return torch.zeros_like(eta), eta
        # Sites of one token lie side by side in the projection and one after the other in the lattice.
        potential = potential.unflatten(-1, (sites, -1)).flatten(1, 2)
        delta = self.potential_scale.to(wide) * potential.to(wide) - self.energy.to(wide)
        if self._position_potential is not None:
            before, first = None if state is None else state.mix.position, 0 if segment is None else segment.offset
            fixed = self._position_potential.of_tokens(absorption, first, before, cu_seqlens).to(wide)
            fixed = fixed.repeat_interleave(sites, dim=-1)
            delta = delta + self.position_scale.to(wide) * fixed[..., None]
        return delta, eta

    def lead(self, dtype: torch.dtype) -> GreenState:
        """M before the first token [heads]: of a medium at rest, or 0 behind a wall."""
        energy, bias = self.energy.to(dtype), self.absorption_bias.to(dtype)
        if self.config.boundary == "wall":
            return GreenState(torch.zeros_like(energy), torch.zeros_like(energy))
        return GreenState(*decaying_root(-energy, F.softplus(bias) + self.config.absorption_floor))

    def with_lead(self, state: MixerState, continues: Bool[Tensor, " rows"]) -> MixerState:
        """`state` with the lead's M in the rows that do not continue."""

        def entered(held: GreenState | None) -> GreenState | None:
            if held is None:
                return None
            lead = self.lead(held.real.dtype)
            parts = (torch.where(continues[:, None], x, start) for x, start in zip(held, lead, strict=True))
            return GreenState(*parts)

        return state._replace(green=entered(state.green), free=entered(state.free))

    @staticmethod
    def _cayley(real: Tensor, imag: Tensor) -> Tensor:
        """(m - i) / (m + i) of every head, inside the unit disc: real parts, then imaginary parts."""
        square = real.square() + (imag + 1).square()
        return torch.cat((1 - 2 * (imag + 1) / square, -2 * real / square), dim=-1)


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
