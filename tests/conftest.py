"""Puts the tests' shared modules (`golden_replay`, `maths_cases`, `step_cases`) on the import path.

pytest runs with `--import-mode=importlib`, which does not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
