"""One simulated run: every rank a small state machine with a clock of its own, all moved at once."""

import numpy as np

from pkd.system import Prediction, System

SLOT, ANSWER, PERMIT, AHEAD, ARRIVAL, TRAIN, SYNC, DONE = range(8)  # what a rank waits for, or does


class SimulatedRun:
    """`last` steps and a few more; what is measured lies between the ends of the steps `first` and `last`."""

    def __init__(self, system: System, first: int, last: int):
        steps = last + system.window + 4
        self.system, self.steps, self.window = system, steps, system.window
        self.first, self.last = first, last  # steps between whose ends is measured
        ranks, self.n = len(system.answer), system.students
        self.student = np.arange(ranks) < self.n
        self.node = system.nodes
        self.state = np.where(self.student, PERMIT, SLOT)
        self.step = np.zeros(ranks, dtype=np.int64)  # that each rank is in
        self.at = np.zeros(ranks)  # each rank's clock
        self.left = np.zeros(ranks)  # seconds of work left, at that time
        self.worked, self.worked_before = np.zeros(ranks), np.zeros(ranks)  # seconds at work; of them before `first`
        self.now = 0.0
        unknown = steps + 2 * self.window + 3
        self.cast = np.full((unknown, ranks), np.inf)
        self.sending = np.full((unknown, ranks), np.inf)  # when each rank's part was ready to leave, or the receive posted
        self.trained = np.full((unknown, self.n), np.inf)
        self.voted, self.arrived = np.full(unknown, np.inf), np.full(unknown, np.inf)
        self.known = [0, 0]  # how many entries of the two are known
        meeting = np.zeros(self.n, dtype=np.int64) if system.meeting is None else system.meeting
        self.members = [np.flatnonzero(meeting == number) for number in range(int(meeting.max(initial=0)) + 1)]
        self.group = np.append(meeting, np.zeros(ranks - self.n, dtype=np.int64))
        self.met = np.full((unknown, len(self.members)), np.inf)
        self.known_met = [0] * len(self.members)
        self.sending[:self.window, :self.n] = 0.0  # what students fill before the first step is not of the steady state
        self.freed = np.full((unknown, ranks), np.inf)  # when each rank's slot had left
        self.ranks = np.arange(ranks)
        self.inbound, self.outbound = system.inbound(), system.outbound()
        shared = system.cores is not None and (np.bincount(self.node, minlength=len(system.cores)) * system.threads
                                               > system.cores).any()
        bound = system.bound()
        self.quantum = 0.0 if shared and ranks <= 8 else bound / 50 if shared else bound
        self.shared = shared

    def finished(self) -> bool:
        return min(self.known_met) > self.last

    def prediction(self) -> Prediction:
        span = self.met[self.last].max() - self.met[self.first].max()
        whole = self.last - self.first
        # Alone on its core, a rank is at work for as long as its work takes; ranks that share cores take longer.
        worked = self.worked - self.worked_before if self.shared else whole * (self.system.answer + self.system.train)
        # Over so few steps teachers may seem faster than their work, for they end less far ahead than they began.
        span = max(span, whole * self.system.bound())
        return Prediction(span / whole, np.clip(worked / span, 0.0, 1.0) if span else worked, self.n)

    def advance(self) -> None:
        """Go on to the next event, or by the quantum if that is further, all ranks at their rates of now."""
        rate = self._rates()
        active = (self.state == ANSWER) | (self.state == TRAIN)
        following = np.where(active, self.at + self.left / rate, self._ready()).min()
        if not np.isfinite(following):
            raise AssertionError(f"the simulated ranks wait for each other: states {self.state}, steps {self.step}")
        end = max(following, self.now + self.quantum) * (1 + 1e-12)
        while self._transitions(rate, end):
            self._agree()
        active = (self.state == ANSWER) | (self.state == TRAIN)
        spent = np.where(active, np.maximum(end - self.at, 0.0), 0.0)
        self.worked += spent
        self.left -= spent * rate
        self.at = np.where(active, np.maximum(self.at, end), self.at)
        self.now = end

    def _rates(self) -> np.ndarray:
        if not self.shared:
            return np.ones(len(self.at))
        active = (self.state == ANSWER) | (self.state == TRAIN)
        wanted = np.bincount(self.node[active], minlength=len(self.system.cores)) * self.system.threads
        return np.minimum(1.0, self.system.cores / np.maximum(wanted, 1))[self.node]

    def _ready(self) -> np.ndarray:
        """When what each rank waits for happens; inf: not known yet, or it does not wait."""
        state, step, w = self.state, self.step, self.window
        ready = np.full(len(state), np.inf)
        freed = self.freed[np.maximum(step - w - 1, 0), self.ranks]
        slot = np.where(step % self.system.together == 0, self._before(freed, step - w - 1), 0.0)  # else it is filled
        ready = np.where(state == SLOT, slot, ready)
        ready = np.where(state == PERMIT, self._before(self.voted[np.maximum(step - w - 2, 0)], step - w - 2), ready)
        ready = np.where(state == AHEAD, self._before(self.voted[np.maximum(step - 2, 0)], step - 2), ready)
        ready = np.where(state == ARRIVAL, self.arrived[step], ready)
        return np.where(state == SYNC, self.met[step, self.group], ready)

    @staticmethod
    def _before(times: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.where(step < 0, 0.0, times)  # before the first step nothing is waited for

    def _transitions(self, rate: np.ndarray, end: float) -> bool:
        """Every rank that can go on before `end` does, once; whether any did."""
        active = (self.state == ANSWER) | (self.state == TRAIN)
        over = np.where(active, self.at + self.left / rate, self._ready())
        going = (over <= end) & (self.state != DONE)
        if not going.any():
            return False
        moment = np.maximum(self.at, np.where(going, over, 0.0))
        self.worked += np.where(active & going, moment - self.at, 0.0)
        before = self.state.copy()
        self.at = np.where(going, moment, self.at)

        def move(source: int, mask=True) -> np.ndarray:
            return np.flatnonzero(going & (before == source) & mask)
        together = self.system.together
        for ranks, ahead in ((move(SLOT), 0), (move(AHEAD), self.window)):
            begins = (self.step[ranks] + ahead) % together == 0
            self.state[ranks], self.left[ranks] = ANSWER, together * begins * self.system.answer[ranks]
        ranks = move(ANSWER, self.student)
        self.sending[self.step[ranks] + self.window, ranks] = self.at[ranks]
        self.state[ranks] = ARRIVAL
        self.state[move(ANSWER, ~self.student)] = PERMIT
        ranks = move(PERMIT)
        self.cast[self.step[ranks], ranks] = self.at[ranks]
        self.state[move(PERMIT, self.student)] = AHEAD
        ranks = move(PERMIT, ~self.student)
        self.sending[self.step[ranks], ranks] = self.at[ranks]
        self._next(ranks, SLOT)
        ranks = move(ARRIVAL)
        self.state[ranks], self.left[ranks] = TRAIN, self.system.train[ranks]
        ranks = move(TRAIN)
        self.trained[self.step[ranks], ranks] = self.at[ranks]
        self.state[ranks] = SYNC
        self._next(move(SYNC), PERMIT)
        return True

    def _next(self, ranks: np.ndarray, state: int) -> None:
        self.step[ranks] += 1
        self.state[ranks] = np.where(self.step[ranks] < self.steps + self.window, state, DONE)

    def _agree(self) -> None:
        """What all ranks of a group have done has a time."""
        lag = self.system.latency
        while self._all(0, self.cast):
            hops = 2 * np.ceil(np.log2(len(self.at)))
            self.voted[self.known[0]] = self.cast[self.known[0]].max() + hops * lag
            self.known[0] += 1
        for k in range(self.known[1], min(int(self.step.max()) + self.window + 1, len(self.sending))):
            posted = self.sending[k, :self.n].max()
            if not np.isfinite(posted):
                break
            before = self.freed[k - 1] if k else np.zeros(len(self.at))
            ready = np.maximum(self.sending[k], posted) + lag * (self.outbound > 0)
            self.freed[k] = np.maximum(ready, before) + self.outbound
        while self._all(1, self.sending):
            k = self.known[1]
            self.arrived[k] = max(self.freed[k].max(), (self.arrived[k - 1] if k else 0.0) + self.inbound)
            self.known[1] += 1
        begun = min(self.known_met) <= self.first
        for group, members in enumerate(self.members):
            while self.known_met[group] < len(self.met):
                trained = self.trained[self.known_met[group], members].max()
                if not np.isfinite(trained):
                    break
                self.met[self.known_met[group], group] = trained + self.system.sync
                self.known_met[group] += 1
        if begun and min(self.known_met) > self.first:
            self.worked_before = self.worked.copy()

    def _all(self, which: int, times: np.ndarray) -> bool:
        row = self.known[which]
        return row < len(times) and bool(np.isfinite(times[row]).all())
