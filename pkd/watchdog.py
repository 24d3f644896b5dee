"""Progress and its absence: no wait without an end, and no timer on a healthy wait.

A thread on every rank writes what its rank does to the store. A rank that has stood still for `limit` seconds, while
nobody else moved either (a long validation elsewhere is progress), names the stalest rank and ends its process. The
same thread ends a rank whose job another rank has given up.
"""

import json
import os
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

EXIT_HANG = 3
OWN_WORK = "its own work"  # in place of a group
GRACE = 10.0  # seconds for a rank to end by itself after another gave the job up


class Watchdog(threading.Thread):
    """store: a connection of its own; say: prints one line to the user; ended by stop()."""

    def __init__(self, store: dist.Store, rank: int, size: int, role: str, limit: float, say: Callable[[str], None]):
        super().__init__(daemon=True, name="watchdog")
        self.store, self.rank, self.size, self.role = store, rank, size, role
        self.limit, self.say = limit, say
        self.knob = "timeouts.start"  # which sets the limit
        self.phase, self.step, self.group, self.count = "starting", 0, OWN_WORK, 0
        self.stop_requested = threading.Event()  # some rank asked the whole job to stop
        self._done, self._wake = threading.Event(), threading.Event()
        self._answered = time.monotonic()  # when the store last did

    def beat(self, phase: str, step: int, group: str | None = None) -> None:
        """Progress: cheap enough for every step. `group` names what the rank is about to wait for, if anything."""
        self.phase, self.step, self.count, self.group = phase, step, self.count + 1, group or OWN_WORK

    def waits(self, group: str) -> None:
        """Progress as well: this rank has done its part and is about to wait for the others of a group."""
        self.group, self.count = group, self.count + 1

    def works(self) -> None:
        """Progress as well: what this rank waited for has come, and it is the others who wait for it from now on."""
        self.waits(OWN_WORK)

    def steady(self, limit: float, knob: str = "timeouts.step") -> None:
        """The start is over: another limit holds from now on, which the others hear of at once."""
        self.knob = knob
        if self.limit != limit:
            self.limit = limit
            self._wake.set()

    def stop(self) -> None:
        self._done.set()
        self._wake.set()

    def run(self) -> None:
        threading.Thread(target=self._guard_store, daemon=True, name="watchdog of the store").start()
        tick, seen, moved, aborted, code = 0, -1, time.monotonic(), None, 1
        others: dict[int, tuple[int, int]] = {}  # rank -> (count, tick) as last read
        silent: dict[int, float] = {}  # rank -> since when its thread has not ticked
        try:
            self._publish(tick, 0.0)  # at once: who hangs before the first tick is to be known by name, too
        except RuntimeError:
            pass
        while not self._done.is_set():
            slept = time.monotonic()
            self._wake.wait(min(2.0, self.limit / 20))
            self._wake.clear()
            now, tick = time.monotonic(), tick + 1
            if now - slept > self.limit / 4:  # the whole job may have been suspended, and the clock went on
                moved, others, silent = now, {}, {}
            if self.count != seen:
                seen, moved, others, silent = self.count, now, {}, {}
            try:
                self._publish(tick, now - moved)
                if self.store.check(["abort"]):
                    if aborted is None:
                        aborted, code = now, int(self.store.get("abort").decode())
                    if now - aborted > GRACE:
                        os._exit(code)
                if self.store.check(["stop"]):
                    self.stop_requested.set()
                self._answered = now
                if now - moved < self.limit / 4:
                    continue
                records = self._read()
            except RuntimeError:  # the store is gone; the thread that guards it will tell
                if aborted is not None and now - aborted > GRACE:
                    os._exit(code)
                continue
            for rank, record in records.items():
                before = others.get(rank)
                if before and record["count"] != before[0]:
                    moved = now  # somebody works: start over
                if not before or record["tick"] != before[1]:
                    silent[rank] = now
                others[rank] = (record["count"], record["tick"])
            if now - moved > self.limit and not self._done.is_set():
                self._end(self._stalest(records, silent, now))

    def _guard_store(self) -> None:
        """End the process when it stands still and the store is silent; a call to a store that hangs never returns."""
        seen, moved = -1, time.monotonic()
        now = moved
        while not self._done.wait(min(2.0, self.limit / 20)):
            slept, now = now, time.monotonic()
            if now - slept > self.limit / 4:  # suspended, as above
                moved = self._answered = now
            if self.count != seen:
                seen, moved = self.count, now
            if now - moved > self.limit and now - self._answered > self.limit:
                self._end("the store does not answer, so rank 0 or whoever serves it is the first to look at")

    def _publish(self, tick: int, age: float) -> None:
        record = {"role": self.role, "phase": self.phase, "step": self.step, "count": self.count, "tick": tick,
                  "age": round(age, 1), "group": self.group}
        self.store.set(f"beat/{self.rank}", json.dumps(record))

    def _read(self) -> dict[int, dict]:
        keys = {rank: f"beat/{rank}" for rank in range(self.size) if rank != self.rank}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def _stalest(self, records: dict[int, dict], silent: dict[int, float], now: float) -> str:
        absent = [rank for rank in range(self.size) if rank != self.rank and rank not in records]
        if absent:
            return f"rank {absent[0]} has never been heard of"
        mute = [rank for rank in records if now - silent[rank] > self.limit / 4]
        everyone = {**records, self.rank: {"role": self.role, "phase": self.phase, "step": self.step,
                                           "age": self.limit, "count": self.count, "group": self.group}}
        rank = mute[0] if mute else self._behind(everyone)
        who = everyone[rank]
        state = "does not answer at all" if mute else f"has stood still for {who['age']:.0f} s"
        return f"the stalest is rank {rank} ({who['role']}), last in {who['phase']} at step {who['step']}, which {state}"

    def _behind(self, everyone: dict[int, dict]) -> int:
        """Who is to blame. Not who waits for a group, if anybody is at work of its own: that one is waited for. Else who
        moved last the longest ago; ages are as exact as the ticks, so of ranks of one role that stopped in the same
        moment, the one that did least before.
        """
        working = {rank: who for rank, who in everyone.items() if who["group"] == OWN_WORK} or everyone
        oldest = max(working, key=lambda rank: working[rank]["age"])
        role, age = working[oldest]["role"], working[oldest]["age"]
        alike = [rank for rank, who in working.items() if who["role"] == role and who["age"] > age - self.limit / 8]
        return min(alike, key=lambda rank: (working[rank]["count"], rank))

    def _end(self, why: str) -> None:
        self.say(f"pkd: hang: rank {self.rank} ({self.role}) waited {self.limit:.0f} s in {self.phase} at step "
                 f"{self.step} for {self.group} without anybody's progress; {why}; raise {self.knob} if that is healthy")
        os._exit(EXIT_HANG)
