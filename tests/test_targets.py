"""From routes and a flat buffer to padded rows: nothing lost, nothing mixed up, for any sources."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.pyramid import build_pyramid
from pkd.recipe import Level
from pkd.schedule import Router, split
from pkd.targets import Unpacker

LEVELS = (Level(model="m", teachers=1), Level(model="m", classes=[[0, 1, 2, 3], [3, 4], [4, 5, 6]]),
          Level(model="m", teachers=3))
PYRAMID = build_pyramid(LEVELS, tuple("abcdefg"), 0)


def value(teacher, position, column):
    """A logit that says whose it is."""
    return teacher * 100 + position + column / 8


@given(data=st.data(), own=st.booleans(), per_batch=st.booleans(), batch=st.integers(8, 80), ranks=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_every_route_reaches_its_sample_with_its_own_logits(data, own, per_batch, batch, ranks):
    teachers = range(len(PYRAMID.teachers))
    hosts = data.draw(st.lists(st.sets(st.sampled_from(teachers)).map(sorted), min_size=1, max_size=4))
    hosts.append([t for t in teachers if not any(t in host for host in hosts)])
    labels = np.array(data.draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch)))
    routes = Router(PYRAMID, hosts, own).routes(labels)
    flat = torch.zeros(routes.size, dtype=torch.float64)
    for teacher, position, offset in zip(routes.teacher, routes.position, routes.offset):
        for column in range(len(PYRAMID.teachers[teacher].classes)):
            flat[offset + column] = value(teacher, position, column)
    unpacker = Unpacker(PYRAMID, list(teachers), batch if per_batch else None)
    seen = set()
    for micro in split(batch, ranks):
        for level, targets in enumerate(unpacker.unpack(routes, flat, micro, torch.device("cpu"))):
            members = [t for t in teachers if PYRAMID.teachers[t].level == level]
            rows = []
            for row in range(len(targets.sample)):
                position = int(targets.sample[row]) + micro.start
                teacher = int(targets.logits[row, 0]) // 100
                own_classes = PYRAMID.teachers[teacher].classes
                kept = targets.mask[row]
                assert targets.classes[row][kept].tolist() == list(own_classes)
                assert targets.logits[row][kept].tolist() == [value(teacher, position, c)
                                                               for c in range(len(own_classes))]
                assert targets.share[row] == np.float32(1 / (batch if per_batch else routes.count[teacher]))
                assert teacher in members
                rows.append((teacher, position))
            assert rows == sorted(rows)
            seen |= set(rows)
    asked = {(t, n) for t in teachers for n in range(batch) if not own or labels[n] in PYRAMID.teachers[t].classes}
    assert seen == asked
