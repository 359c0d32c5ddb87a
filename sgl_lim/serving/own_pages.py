"""What layers choose by that choose pages for themselves: bounds of their keys, or keys of gates."""

from typing import Any

from sgl_lim.gates.rotation import gate_rotation
from sgl_lim.gates.weights import ModelShape, load_gates, of_heads, with_rotation
from sgl_lim.methods import HeadsOfRank, Method, Role, SeerAttention
from sgl_lim.serving.gate_store import GateStore
from sgl_lim.serving.key_scales import attention_layers
from sgl_lim.serving.model_rotation import check_length, rotations_of
from sgl_lim.serving.page_store import PageStore

Pages = PageStore | GateStore


def build_pages(method: Method, roles: tuple[Role, ...], runner: Any, heads: HeadsOfRank) -> Pages | None:
    """What a rank's layers choose by; None where none chooses for itself.

    Raises:
        GateError: the gates do not fit the model; what is known before weights load was refused then.
        UnknownRotation: how the model rotates keys cannot be told.
        UnknownScale: by what scale the model stores keys cannot be told.
    """
    choosing = [layer for layer, role in enumerate(roles) if role is Role.OWN]
    pool, model = runner.token_to_kv_pool, runner.model_config
    if not choosing:
        return None
    if not isinstance(method, SeerAttention):
        return PageStore(pool, choosing, model.dtype)
    config = method.gate_config
    assert config is not None and method.gates is not None
    keys = pool.get_key_buffer(choosing[0])
    own_kv_heads = keys.shape[1]
    group = heads.own // own_kv_heads
    shape = ModelShape(len(roles), heads.all, heads.all // group, keys.shape[2])
    gates = load_gates(method.gates, shape, model.dtype, keys.device)
    turned = rotations_of(runner.model, choosing)
    check_length(turned[choosing[0]], model.context_len)
    own = {
        layer: with_rotation(
            of_heads(gates[layer], heads.first // group, own_kv_heads),
            gate_rotation(config, shape.head_dim, turned[layer].rotation, turned[layer].theta),
        )
        for layer in choosing
    }
    rotations = {layer: turned[layer].rotation for layer in choosing}
    return GateStore(pool, own, rotations, attention_layers(runner.model, choosing), config.block)
