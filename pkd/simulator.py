"""The steady state of a run as a small discrete simulation: step time, and who waits; pure.

It follows the loops of distill.py, ballot.py and exchange.py. A student rank, at step k: casts its vote, runs its own
teachers for step k + window, waits for the soft targets of step k, trains, and meets the students that it has to. A teacher
rank fills a free slot, casts its vote, sends. Teachers answer for several steps at once, if they do: then the ranks that
answer have much to do in one step and little in the next, and those that meet them in both wait in turn. Nobody is more than
window + 2 steps ahead of the slowest vote.
Ranks of a node share its cores evenly. Within a quantum of time that sharing is held fixed; all else is exact.
"""

from pkd.simulated_run import SimulatedRun
from pkd.system import Prediction, System


def simulate(system: System) -> Prediction:
    """Predicted steady state: what lies between the way there and the end, where teachers are done before students."""
    first = 8 + 2 * system.window
    run = SimulatedRun(system, first, first + -(-24 // system.together) * system.together)
    while not run.finished():
        run.advance()
    return run.prediction()
