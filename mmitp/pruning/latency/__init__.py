"""Measured latency as a cost.

``measure`` makes a table, ``table`` says what one must look like, ``cost`` interpolates it, ``calibration`` holds it to
the clock. ``timing`` has the clocks, ``networks`` times whole slimmed networks, ``fit`` finds what they take beyond
their layers.
"""

from .calibration import Calibration
from .cost import LatencyCost
from .measure import measure_latency
from .networks import clock_ratio, paired_times, time_in_turn
from .table import TABLE_FORMAT, check_latency_table, read_latency_table
from .timing import processor

__all__ = [
    "TABLE_FORMAT",
    "Calibration",
    "LatencyCost",
    "check_latency_table",
    "clock_ratio",
    "measure_latency",
    "paired_times",
    "processor",
    "read_latency_table",
    "time_in_turn",
]
