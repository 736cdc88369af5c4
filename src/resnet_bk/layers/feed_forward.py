"""SwiGLU feed-forward."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """W_out (silu(W_gate u) * W_up u), the two input matrices stored as one."""

    def __init__(self, d_model: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * hidden_dim, bias=False)
        self.out_proj = nn.Linear(hidden_dim, d_model, bias=False)

    def forward(self, u: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """Output of the same shape and dtype as `u`."""
        gate, up = self.in_proj(u).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * up)
