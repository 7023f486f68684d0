"""Runs when a child process of a test starts: the process finds the simulated CuPy."""

import os
import sys

if "SIMULATED_MACHINE" in os.environ:
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from simulated_finder import install

    install()
