"""Names of the golden files' parameters (the released code's) in our modules."""

import re

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
_TOP = {
    "dim_red": "reduction",
    "bottleneck1.0": "edge_norm",
    "bottleneck2.0": "node_norm",
    "fc.0": "edge_out",
    "cls.0": "node_classifier",
}


def graph_name(golden: str) -> str | None:
    """Our name of a graph network entry, e.g. "gnn.0.edge_model.att.q_linear.weight"; None for unused parameters."""
    stem, _, leaf = golden.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    match = re.fullmatch(r"gnn\.(\d+)\.(edge_model|node_model\.layers\.0)\.(.+)", stem)
    if match is None:
        raise KeyError(f"unknown golden parameter {golden}")
    layer, kind, part = match.groups()
    if part == "update_node":  # saved by the released code, used nowhere
        return None
    if kind == "edge_model":
        return f"edge_blocks.{layer}.{_EDGE[part]}.{leaf}"
    return f"node_blocks.{layer}.{_NODE[part]}.{leaf}"
