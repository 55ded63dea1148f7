"""Our decoder's parameters as the state dict of a transformers Llama, and back; NumPy only.

Ours `[in, out...]`, layers stacked on a leading axis; theirs `[out, in]`, one tensor a layer.
"""

from typing import Any

import numpy as np

from models.config import ModelConfig

Tree = dict[str, Any]
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def to_llama(params: Tree, config: ModelConfig) -> dict[str, np.ndarray]:
    """A transformer's parameters, or a scorer's {trunk, head}, under transformers' names."""
    if "trunk" in params:
        return {**to_llama(params["trunk"], config), "score.weight": np.asarray(params["head"]["w"]).T}
    D = config.d_model
    state = {
        "model.embed_tokens.weight": np.asarray(params["embed"]),
        "model.norm.weight": np.asarray(params["final_norm"]["scale"]),
    }
    if not config.tie_embeddings:
        state["lm_head.weight"] = np.asarray(params["unembed"]).T
    layers = params["layers"]
    for i in range(config.num_layers):
        at = f"model.layers.{i}"
        for ours, theirs in _NORMS.items():
            state[f"{at}.{theirs}.weight"] = np.asarray(layers[ours]["scale"][i])
        for name in "qkv":
            w = np.asarray(layers["attention"][f"w{name}"][i])
            state[f"{at}.self_attn.{name}_proj.weight"] = w.reshape(D, -1).T
        state[f"{at}.self_attn.o_proj.weight"] = np.asarray(layers["attention"]["wo"][i]).reshape(-1, D).T
        for name in ("gate", "up", "down"):
            state[f"{at}.mlp.{name}_proj.weight"] = np.asarray(layers["mlp"][name][i]).T
    return state
