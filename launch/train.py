"""Train: `accelerate launch launch/train.py --config configs/NAME.yaml [section.key=value ...]`.

Plain `python launch/train.py` and `torchrun` do the same; several processes (launch/accelerate/) train one run on one
global batch. `--check` validates the configuration, the data and a few steps, predicts time and memory, and stops.

SIGTERM or SIGUSR1 ends the run after the step that is under way, saved, with status 75 (docs/clusters.md).
"""

from gcahng.training.signals import Signals, follow_launcher

if __name__ == "__main__":
    signals = Signals()
    with signals.noted():
        follow_launcher()
        # Now, since torch comes with them, which takes seconds.
        from launch.cli import run
        from launch.training import train

        run(lambda: train(signals))
