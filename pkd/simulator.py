"""The steady state of a run as a small discrete simulation: step time, and who waits; pure.

It follows the loops of distill.py, ballot.py and exchange.py. A student rank, at step k: casts its vote, runs its own
teachers for step k + window, waits for the soft targets of step k, trains, and meets the other students. A teacher rank
fills one of window + 1 slots, casts its vote, sends. Nobody is more than window + 2 steps ahead of the slowest vote.
Ranks of a node share its cores evenly. Within a quantum of time that sharing is held fixed; all else is exact.
"""

from pkd.simulated_run import SimulatedRun
from pkd.system import Prediction, System


def simulate(system: System) -> Prediction:
    """Predicted steady state: what lies between the way there and the end, where teachers are done before students."""
    run = SimulatedRun(system, first=8 + 2 * system.window, last=32 + 2 * system.window)
    while not run.finished():
        run.advance()
    return run.prediction()
