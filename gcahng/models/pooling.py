"""From a feature map or tokens to one vector per image."""

from torch import Tensor

from gcahng.errors import InputError

POOLINGS = ("avg", "max", "avg+max", "cls")


def pool(features: Tensor, mode: str, num_prefix_tokens: int = 0) -> Tensor:
    """Pool features over their positions.

    Args:
        features: Feature map (B, C, h, w) or tokens (B, T, C).
        mode: `avg`, `max`, `avg+max` (their sum), or `cls` (the first token).
        num_prefix_tokens: Tokens before the patch tokens; `avg` and `max` leave them out.
    Returns:
        (B, C)
    Raises:
        InputError: unknown mode, features of another shape, or `cls` without a class token.
    """
    if mode not in POOLINGS:
        raise InputError(f"`mode` must be one of {', '.join(POOLINGS)}: got {mode!r}.")
    if features.ndim == 4:
        if mode == "cls":
            raise InputError(
                "`pooling` cls needs a class token, but the backbone returns a feature map. Set "
                "model.pooling to avg, max or avg+max."
            )
        features = features.flatten(2).transpose(1, 2)
        num_prefix_tokens = 0
    elif features.ndim != 3:
        raise InputError(
            "A backbone must return a feature map (B, C, h, w) or tokens (B, T, C): got shape "
            f"{tuple(features.shape)}. Leave out its own pooling, or unflatten it to (B, C, 1, 1)."
        )
    if mode == "cls":
        if num_prefix_tokens < 1:
            raise InputError(
                "`pooling` cls needs a class token, but this backbone has none "
                "(num_prefix_tokens is 0). Set model.pooling to avg, max or avg+max."
            )
        return features[:, 0]
    patches = features[:, num_prefix_tokens:]
    if patches.shape[1] == 0:
        raise InputError(
            f"`pooling` {mode} needs patch tokens, but this backbone returns only its "
            f"{num_prefix_tokens} class token(s). Set model.pooling to cls."
        )
    if mode == "avg":
        return patches.mean(dim=1)
    if mode == "max":
        return patches.amax(dim=1)
    return patches.mean(dim=1) + patches.amax(dim=1)
