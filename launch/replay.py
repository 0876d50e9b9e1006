"""Repeat a step that met numbers that are not finite, from what the run kept of it, and find where they come from.

python launch/replay.py runs/NAME/faults/step-N [--device cpu|cuda] [--precision fp32|bf16|fp16] [--json]
        [--trust-components]

The data set is not needed. The exit status is 1 if the step fails again, 0 if it does not, 2 if it cannot be repeated.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gcahng.training.launched import require_one_process
from gcahng.training.replay import Replayed, replay
from launch.checkpoints import add_trust_option
from launch.cli import run

LISTED = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/replay.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path, metavar="DUMP", help="folder RUN/faults/step-N")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the run's, the CPU where there is no CUDA")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: the run's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_trust_option(parser)
    return parser.parse_args(arguments)


def text(found: Replayed) -> str:
    """What was found, in lines."""
    fault = found.fault
    lines = [f"The run: {fault.message}"]
    again = "not finite again" if found.reproduced else "finite this time"
    lines.append(f"The {fault.reach} pass of step {fault.step}, {found.precision} on {found.device}: {again}")
    lines += [f"  {name}: {value:.6g}" for name, value in found.losses.items()]
    for what, names in {
        "weights that are not finite": found.bad_weights,
        "gradients that are not finite": found.bad_gradients,
        "samples whose embeddings are not finite": found.bad_samples,
    }.items():
        if names:
            more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
            lines.append(f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}")
    if found.bad_module is not None:
        lines.append(f"first module whose output is not finite: {found.bad_module} ({found.bad_module_kind})")
    return "\n".join(lines)


def as_json(found: Replayed) -> str:
    """The same as one JSON object; numbers that JSON does not have are text."""
    values: dict[str, Any] = asdict(found)
    del values["fault"]["keys"]
    values["losses"] = {
        name: value if abs(value) < float("inf") else str(value) for name, value in found.losses.items()
    }
    return json.dumps(values | {"reproduced": found.reproduced, "bad_samples": found.bad_samples})


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    require_one_process("launch/replay.py")
    found = replay(
        options.dump,
        device=options.device,
        precision=options.precision,
        trust_components=options.trust_components,
    )
    print(as_json(found) if options.json else text(found))
    return int(found.reproduced)


if __name__ == "__main__":
    run(main)
