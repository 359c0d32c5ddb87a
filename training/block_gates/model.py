"""Gates that are trained, and the pass over a frozen model in which they learn."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lim_kernels.block_gates import Gate, Rotation
from sgl_lim.gates import GateConfig
from sgl_lim.gates.weights import KNORM, LINEAR_K, LINEAR_Q, QNORM, ModelShape

from .loss import Attended, gate_loss


class TrainedGates(nn.Module):
    """One gate a layer, float32, by the published names of its weights."""

    def __init__(self, config: GateConfig, shape: ModelShape) -> None:
        """Fresh weights for a model of this shape; query heads are projected each (`Qproj`)."""
        super().__init__()
        self.config, self.shape = config, shape
        inputs = len(config.pools) * shape.head_dim
        self.layers = nn.ModuleList(
            nn.ParameterDict(
                {
                    LINEAR_Q: _drawn(shape.kv_heads, shape.group, shape.head_dim, config.width),
                    LINEAR_K: _drawn(shape.kv_heads, inputs, config.width),
                    **(
                        {name: nn.Parameter(torch.ones(config.width)) for name in (QNORM, KNORM)} if config.norm else {}
                    ),
                }
            )
            for _ in range(shape.layers)
        )

    def parts(self, layer: int) -> dict[str, Tensor]:
        """A layer's weights by name."""
        return dict(self.layers[layer].items())  # type: ignore[operator]

    def gate(self, layer: int, rotation: Rotation | None) -> Gate:
        """As the operators take it; a view of the weights."""
        parts = self.parts(layer)
        norms = parts.get(QNORM), parts.get(KNORM)
        return Gate(parts[LINEAR_Q].flatten(1, 2), parts[LINEAR_K], *norms, self.config.pools, rotation)


def _drawn(*size: int) -> nn.Parameter:
    weights = torch.empty(size)
    nn.init.normal_(weights, std=size[-2] ** -0.5)
    return nn.Parameter(weights)


class GatePass:
    """Dense causal attention of whole sequences, in which each layer's gate learns from it.

    The model is frozen, so that a layer's gate depends on nothing of other layers: its gradients are made on the spot,
    and no layer's scores outlive it.
    """

    def __init__(self, gates: TrainedGates, model: Rotation, own: Rotation | None, *, learns: bool) -> None:
        """`model` is the rotation of the model's queries and keys, `own` that of the gates'."""
        self._gates, self._model, self._own = gates, model, own
        self._learns = learns
        self.losses: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `sgl_lim.evaluate.step_rows.Pass`, for batches."""
        with torch.set_grad_enabled(self._learns):
            loss = gate_loss(
                self._gates.gate(layer, self._own),
                Attended(q.detach(), k.detach(), scale, self._model),
                block=self._gates.config.block,
            )
            if self._learns:
                loss.backward()
        self.losses[layer] = loss.detach()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()
