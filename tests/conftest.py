"""Puts the tests' shared modules (`golden_replay`, `maths_cases`, `step_cases`) on the import path.

pytest runs with `--import-mode=importlib`, which does not.
"""

import gc
import signal
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
# Hundreds of thousands of objects live as long as the tests: looking for garbage after each 700 new ones takes a
# twentieth of the time.
gc.set_threshold(10_000, 10, 10)
# Of a shell's background job SIGINT is ignored, and with it in all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many inputs each reader was tried with (see `fuzzing`), in whichever process."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    if name == "fuzz":
                        terminalreporter.write_line(f"fuzz: {value}")
