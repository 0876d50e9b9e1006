"""Holding training classes out, to choose a checkpoint by them."""

import numpy as np

from gcahng.data.draws import Purpose, check_seed, permutation, stream
from gcahng.data.plans.class_table import ClassTable, Integers
from gcahng.errors import InputError


def split_validation(table: ClassTable, share: float, seed: int) -> tuple[ClassTable, Integers]:
    """Hold classes out for validation.

    Args:
        table: All training classes.
        share: Share of the classes to hold out, in [0, 1); the number is rounded.
        seed: Decides which.
    Returns:
        The table of the classes that stay, numbered anew, and the held-out class ids, ascending.
        `table.rows_of_classes(ids)` are the validation images.
    Raises:
        InputError: `share` is out of range or leaves no class to train on.
    """
    if not 0 <= share < 1:
        raise InputError(
            f"`share` of validation classes must be from 0 to below 1, got {share}. Give a share such as 0.1."
        )
    total = table.num_classes
    held_out = round(share * total)
    if held_out >= total:
        raise InputError(
            f"`share` {share} of {total} classes holds out {held_out}: expected at least one "
            "class to train on. Lower the share."
        )
    if held_out == 0:
        return table, table.class_ids[:0]
    order = permutation(stream(check_seed(seed), Purpose.VALIDATION_CLASSES), total)
    validation = np.sort(order[:held_out])
    return table.select(np.sort(order[held_out:])), table.class_ids[validation]
