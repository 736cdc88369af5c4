"""RMS norm within heads, then a silu gate: one pass over memory forward and one backward."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from resnet_bk.errors import ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend
from resnet_bk.ops.gated_norm.chunked import gated_norm_op
from resnet_bk.ops.gated_norm.reference import gated_norm_reference

__all__ = ["gated_norm"]


def gated_norm(
    y: Float[Tensor, "*batch heads channels"],
    gate: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, " inner"],
    *,
    epsilon: float = 1e-5,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch inner"]:
    r"""Every head of y divided by its root mean square, times weight, times silu(gate).

        out = y / sqrt(mean_channels(y^2) + epsilon) * weight * silu(gate),    inner = heads * channels

    Args:
        y: values, head by head.
        gate: raw gate, the heads' channels side by side.
        weight: one factor a channel.
        epsilon: added to the mean square; > 0.
        backend: "reference" is plain PyTorch; "chunked" works on blocks of tokens that stay in cache, with a
            hand-written backward that keeps nothing but its inputs; "triton" is one kernel a direction.

    Returns:
        The gated output in the dtype of `y`; computed in float32 or wider.

    Raises:
        ShapeError: shapes that do not fit. BackendError: an unknown backend, or one that cannot run here.

    Cost: reads y and gate once and writes the output once; backward reads three and writes two such tensors.
    """
    inner = y.shape[-1] * y.shape[-2] if y.dim() >= 2 else 0
    if gate.shape != (*y.shape[:-2], inner) or weight.shape != (inner,):
        raise ShapeError(
            f"y [*batch, heads, channels] = {list(y.shape)} needs gate [*batch, heads * channels] and weight "
            f"[heads * channels]; got {list(gate.shape)} and {list(weight.shape)}."
        )
    chosen = choose_backend(backend, y)
    if chosen == "reference":
        return gated_norm_reference(y, gate, weight, epsilon)
    if chosen == "triton":
        from resnet_bk.ops.gated_norm.triton import gated_norm_triton as op
    else:
        op = gated_norm_op
    rows = y.shape[:-2].numel()
    # Views wherever the batch dimensions lie evenly, as in a slice of a projection's output.
    flat = op(y.reshape(rows, *y.shape[-2:]), gate.reshape(rows, inner), weight, epsilon)
    return flat.view(gate.shape)
