"""Names of the released graph network (`gnn.*` of GCA-HNG) in `gcahng.graph.GraphNetwork`, and back."""

import re

_TOP = {
    "dim_red": "reduction",
    "bottleneck1.0": "edge_norm",
    "bottleneck2.0": "node_norm",
    "fc.0": "edge_out",
    "cls.0": "node_classifier",
}
_NODE = {
    "att.q_linear": "query",
    "att.k_linear": "key",
    "att.v_linear": "value",
    "att.out": "out",
    "linear1": "ffn_in",
    "linear2": "ffn_out",
    "edge_to_node": "edge_to_node",
    "norm.1": "norm.layer_norm",
}
_EDGE = {
    "att.q_linear": "query",
    "att.k_linear": "key",
    "att.v_linear": "value",
    "node_to_edge": "node_to_edge",
    "norm.1": "norm.layer_norm",
    "linear.0": "ffn_in",
    "linear.2": "ffn_norm",
    "linear.3": "ffn_out",
}
_BLOCKS = {"node_model.layers.0": ("node_blocks", _NODE), "edge_model": ("edge_blocks", _EDGE)}
# A Linear of every node block that the released code saves and uses nowhere.
_UNUSED = "update_node"


def graph_name(released: str) -> str | None:
    """Our name of an entry of the released network, `gnn.` left out; None for one that the released code never uses.

    Raises:
        KeyError: It has no such entry.
    """
    stem, _, leaf = released.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    match = re.fullmatch(rf"gnn\.(\d+)\.({'|'.join(map(re.escape, _BLOCKS))})\.(.+)", stem)
    if match is None:
        raise KeyError(released)
    layer, kind, part = match.groups()
    blocks, parts = _BLOCKS[kind]
    if parts is _NODE and part == _UNUSED:
        return None
    if part not in parts:
        raise KeyError(released)
    return f"{blocks}.{layer}.{parts[part]}.{leaf}"


def released_graph_name(own: str) -> str:
    """The released name, `gnn.` left out, of an entry of our network.

    Raises:
        KeyError: The released network has none.
    """
    stem, _, leaf = own.rpartition(".")
    for theirs, ours in _TOP.items():
        if ours == stem:
            return f"{theirs}.{leaf}"
    for kind, (blocks, parts) in _BLOCKS.items():
        for theirs, ours in parts.items():
            match = re.fullmatch(rf"{blocks}\.(\d+)\.{re.escape(ours)}", stem)
            if match is not None:
                return f"gnn.{match[1]}.{kind}.{theirs}.{leaf}"
    raise KeyError(own)
