"""Puts the tests' shared modules (`golden_replay`, `maths_cases`, `step_cases`) on the import path.

pytest runs with `--import-mode=importlib`, which does not.
"""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Hundreds of thousands of objects live as long as the tests: looking for garbage after each 700 new ones takes a
# twentieth of the time.
gc.set_threshold(10_000, 10, 10)
