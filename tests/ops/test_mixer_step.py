"""The fused decode step: its reference against the mixer's own step, the kernel against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.models.config import ModelConfig
from resnet_bk.ops import dispatch
from resnet_bk.ops.mixer_step import StepParameters, mixer_step, mixer_step_
from resnet_bk.ops.resolvent import GreenState
from resnet_bk.ops.semiseparable import MixState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOURCES = ("gated", "free", "unit")
# Triton's interpreter gets bfloat16 products wrong.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def make_case(
    batch, heads, state, value, *, source="gated", dtype=torch.float32, position=1_000_003, device=DEVICE, shift=False
):
    """A random projection in `dtype`, parameters in `dtype`, and a float32 state far into a text."""
    generator = torch.Generator().manual_seed(batch)

    def draw(*shape, to=dtype):
        return torch.randn(shape, generator=generator).to(device, to)

    inner = heads * value
    # Wider than needed: rows of a projection may lie apart.
    width = 2 * (inner + state + heads) + heads * (source != "unit")
    projection = draw(batch, width + 3)[:, :width]
    scalars = [draw(heads) for _ in range(5)]
    parameters = StepParameters(
        draw(heads, state), draw(heads, state), *scalars[:4], None if source == "unit" else scalars[4], draw(inner),
        draw(state) if shift else None,
    )  # fmt: skip
    mix = MixState(
        draw(batch, heads, state, value, to=torch.float32), position + torch.arange(batch, device=device) * 77_777
    )
    green = GreenState(draw(batch, heads, to=torch.float32), draw(batch, heads, to=torch.float32).abs())
    return projection, parameters, mix, green


def widened(case):
    projection, parameters, mix, green = case
    return (
        projection.double(),
        parameters.to(torch.float64),
        MixState(mix.memory.double(), mix.position),
        GreenState(*(part.double() for part in green)),
    )


def flat(results):
    out, mix, green = results
    return {"out": out, "memory": mix.memory, "real": green.real, "imag": green.imag}


def error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("source", SOURCES)
def test_the_reference_is_the_mixer_s_step(source):
    torch.manual_seed(0)
    sizes = dict(vocab_size=2, d_model=12, num_layers=1, feed_forward_dim=8, head_dim=6, state_size=8)
    mixer = Mixer(ModelConfig(**sizes, source=source, absorption_floor=0.01, norm_epsilon=1e-3)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        u = torch.randn(2, 8, 12, dtype=torch.float64)
        _, state = mixer(u[:, :7])
        expected, after = mixer(u[:, 7:], state)
        out, mix, green = mixer_step(
            mixer.in_proj(u[:, 7]),
            StepParameters(
                mixer.query_bias, mixer.key_bias, mixer.absorption_bias, mixer.potential_scale, mixer.energy,
                mixer.skip, None if source == "unit" else mixer.source_bias, mixer.norm_weight, mixer.key_shift,
            ),
            state.mix, state.green, previous=state.key, source=source, absorption_floor=0.01, rotary_fraction=0.25,
            epsilon=1e-3, backend="reference",
        )  # fmt: skip
    torch.testing.assert_close(mixer.out_proj(out), expected[:, 0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mix.memory, after.mix.memory, rtol=1e-11, atol=1e-11)
    assert torch.equal(mix.position, after.mix.position)
    torch.testing.assert_close(tuple(green), tuple(after.green), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 2, 32, 16), (2, 3, 24, 12), (2, 1, 128, 64)], ids=str)
def test_the_kernel_errs_no_more_than_plain_pytorch(shape, source, dtype):
    case = make_case(*shape, source=source, dtype=dtype)
    truth = flat(mixer_step(*widened(case), source=source, backend="reference"))
    plain = flat(mixer_step(*case, source=source, backend="reference"))
    ours = mixer_step(*case, source=source, backend="triton")
    assert torch.equal(ours[1].position, case[2].position + 1)
    assert ours[0].dtype == dtype
    for name, tensor in flat(ours).items():
        # The floor is two roundings of float32, for the tiny cases in which plain PyTorch is lucky.
        assert error(tensor, truth[name]) <= 2 * error(plain[name], truth[name]) + 1.2e-7, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 32, 16), (2, 3, 24, 12)], ids=str)
def test_keys_that_know_the_token_before(shape, dtype):
    case = make_case(*shape, dtype=dtype, shift=True)
    projection, parameters, *_ = case
    batch, heads, state, value = shape
    previous = torch.randn(batch, state, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    # The same step without a shift, of a projection whose keys were shifted beforehand.
    shifted = projection.double()
    keys = slice(2 * heads * value, 2 * heads * value + state)
    shifted[:, keys] += parameters.key_shift.double() * previous.double()
    _, wide, *states = widened(case)
    truth = flat(mixer_step(shifted, wide._replace(key_shift=None), *states, backend="reference"))
    plain = flat(mixer_step(*case, previous=previous, backend="reference"))
    for name, tensor in flat(mixer_step(*case, previous=previous, backend="triton")).items():
        assert error(tensor, truth[name]) <= 2 * error(plain[name], truth[name]) + 1.2e-7, name
    fresh = mixer_step(*case, previous=previous, backend="triton")[0]
    assert torch.equal(mixer_step_(*case, previous=previous, backend="triton"), fresh)
    with pytest.raises(ShapeError, match=r"previous goes with .*, which is there"):
        mixer_step(*case)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_in_place_is_the_same_step(backend):
    case = make_case(3, 2, 32, 16)
    fresh = flat(mixer_step(*case, backend=backend))
    kept = [part.data_ptr() for part in (case[2].memory, case[2].position, *case[3])]
    position = case[2].position.clone()
    out = mixer_step_(*case, backend=backend)
    assert [part.data_ptr() for part in (case[2].memory, case[2].position, *case[3])] == kept
    assert torch.equal(case[2].position, position)
    for name, tensor in flat((out, *case[2:])).items():
        assert torch.equal(tensor, fresh[name]), name


def test_the_functional_step_leaves_the_state_alone():
    case = make_case(2, 2, 16, 16)
    before = [part.clone() for part in (case[2].memory, case[2].position, *case[3])]
    mixer_step(*case, backend="triton")
    for part, old in zip((case[2].memory, case[2].position, *case[3]), before, strict=True):
        assert torch.equal(part, old)


def test_pairs_that_do_not_turn():
    case = make_case(2, 2, 16, 16, position=1000)
    truth = flat(mixer_step(*widened(case), rotary_fraction=0.25, backend="reference"))
    whole = flat(mixer_step(*widened(case), backend="reference"))
    for name, tensor in flat(mixer_step(*case, rotary_fraction=0.25, backend="triton")).items():
        assert error(tensor, truth[name]) < 2e-6, name
    assert error(whole["out"], truth["out"]) > 1e-2


@pytest.mark.parametrize("position", [0, 1, 2**24 + 1, 10**7 + 19, 2**30 + 12345])
def test_angles_are_exact_at_any_position(position):
    """From an empty memory the memory is the turned key times the value, so an angle's error shows undiluted."""
    case = make_case(2, 1, 128, 16, position=position)
    case[2].memory.zero_()
    truth = mixer_step(*widened(case), backend="reference")[1].memory
    assert error(mixer_step(*case, backend="triton")[1].memory, truth) < 3e-7  # measured 8e-8


def test_walls_and_extreme_projections():
    batch, heads, state, value = 4, 2, 16, 16
    case = make_case(batch, heads, state, value)
    case[2].memory[0].zero_()
    case[3].real[0], case[3].imag[0] = 0, 0  # a hard wall
    projection = case[0]
    absorption = projection[:, -2 * heads : -heads]
    absorption[1], absorption[2], absorption[3] = -40, 40, -9
    projection[1, -3 * heads : -2 * heads] = 1e6  # potential
    for source in ("gated", "free"):
        truth = flat(mixer_step(*widened(case), source=source, absorption_floor=1e-6, backend="reference"))
        ours = flat(mixer_step(*case, source=source, absorption_floor=1e-6, backend="triton"))
        for name, tensor in ours.items():
            for row in range(batch):
                assert error(tensor[row], truth[name][row]) < 2e-6, (name, row)  # measured 3e-7


def test_memory_that_is_transposed_or_narrow_is_read_right():
    projection, parameters, mix, green = make_case(2, 2, 16, 8)
    turned = MixState(mix.memory.transpose(2, 3).contiguous().transpose(2, 3), mix.position)
    expected = flat(mixer_step(projection, parameters, mix, green, backend="triton"))
    for name, tensor in flat(mixer_step(projection, parameters, turned, green, backend="triton")).items():
        assert torch.equal(tensor, expected[name])
    with pytest.raises(ShapeError, match=r"mix.memory is torch.float32 with strides .* in place only if"):
        mixer_step_(projection, parameters, turned, green)
    with pytest.raises(ShapeError, match=r"green.real is torch.float16"):
        mixer_step_(projection, parameters, mix, GreenState(green.real.half(), green.imag))


def test_operators_are_registered():
    from resnet_bk.ops.mixer_step import triton as kernels

    projection, parameters, mix, green = make_case(2, 2, 16, 8)
    arguments = (projection, *parameters, *mix, *green, None, "gated", 1e-3, 1e4, 1.0, 1e-5)
    torch.library.opcheck(kernels.mixer_step_triton, arguments)
    torch.library.opcheck(kernels.mixer_step_triton_, arguments)


def test_a_wrong_kernel_is_refused(monkeypatch):
    from resnet_bk.ops.mixer_step import triton as kernels

    right = kernels._launch

    def wrong(projection, parameters, state, after, *options):
        out = right(projection, parameters, state, after, *options)
        after[0][..., -1] = 0
        return out

    monkeypatch.setattr(dispatch, "_verified", set())
    monkeypatch.setattr(kernels, "_launch", wrong)
    with pytest.raises(BackendError, match=r"mixer_step disagrees .* memory .*e-01 \(bound 1e-05\)"):
        mixer_step(*make_case(2, 2, 16, 8), backend="triton")


def test_what_does_not_fit_is_named():
    projection, parameters, mix, green = case = make_case(2, 2, 16, 8, device="cpu")
    with pytest.raises(DomainError, match="source is 'unit' with a source_bias"):
        mixer_step(*case, source="unit")
    with pytest.raises(DomainError, match="absorption_floor is 0"):
        mixer_step(*case, absorption_floor=0)
    with pytest.raises(ShapeError, match=r"projection must be \[2, 70\]; got \[2, 69\]"):
        mixer_step(projection[:, :-1], parameters, mix, green)
    with pytest.raises(ShapeError, match=r"parameters.skip must be \[2\]; got \[1\]"):
        mixer_step(projection, parameters._replace(skip=parameters.skip[:1]), mix, green)
    with pytest.raises(ShapeError, match=r"green.imag must be \[2, 2\]"):
        mixer_step(projection, parameters, mix, GreenState(green.real, green.imag[:1]))
    with pytest.raises(ShapeError, match=r"mix.memory must be \[batch, heads, state, value\]"):
        mixer_step(projection, parameters, mix._replace(memory=mix.memory[0]), green)
    with pytest.raises(BackendError, match="float64"):
        mixer_step(*widened(case), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [32, 64, 128])
@pytest.mark.parametrize("state", [64, 128])
@pytest.mark.parametrize("batch", [1, 65])
def test_record_shapes_on_the_gpu(batch, state, value, dtype):
    case = make_case(batch, 24, state, value, dtype=dtype)
    truth = flat(mixer_step(*widened(case), backend="reference"))
    plain = flat(mixer_step(*case, backend="reference"))
    for name, tensor in flat(mixer_step(*case)).items():
        assert error(tensor, truth[name]) <= 2 * error(plain[name], truth[name]) + 1.2e-7, name


@pytest.mark.gpu
def test_memory_of_more_than_two_to_the_31_numbers():
    """Batch 4,100 with 64 heads of 128 x 64: the last rows lie beyond what 32 bits can address (8.6 GB)."""
    batch, rows = 4100, 4
    small = make_case(rows, 64, 128, 64)
    projection, parameters, mix, green = small
    expected = flat(mixer_step(*widened(small), backend="reference"))

    def repeated(x):
        """Row i of the large tensor is row i modulo 4 of the small one."""
        return x.repeat(batch // rows, *[1] * (x.dim() - 1))

    large = MixState(*map(repeated, mix)), GreenState(*map(repeated, green))
    assert large[0].memory.numel() > 2**31
    out = mixer_step_(repeated(projection), parameters, *large)
    for name, tensor in flat((out, *large)).items():
        for part in (tensor[:rows], tensor[-rows:]):
            assert error(part, expected[name]) < 1e-6, name
        assert torch.equal(tensor[:rows], tensor[-rows:])
        assert torch.equal(tensor[:rows], tensor[2048 : 2048 + rows])
