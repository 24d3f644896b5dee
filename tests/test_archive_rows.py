"""Rows of an archive, without a run: each has one place, coarse ones keep what they promise, an audit draws among them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.archive_audit import compare, draw
from pkd.archive_layout import Layout
from pkd.pyramid import build_pyramid
from pkd.recipe import Archive, Level
from pkd.row_format import RowFormat
from pkd.schedule import BLOCK

PYRAMID = build_pyramid((Level(model="m", teachers=1), Level(model="m", classes=[[0, 1, 2, 3], [3, 4], [4, 5, 6]]),
                         Level(model="m", teachers=3)), tuple("abcdefg"), 0)


@given(labels=st.lists(st.integers(0, 7), min_size=1, max_size=300), own=st.booleans(), count=st.integers(1, 3000),
       seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_an_audit_draws_different_rows_that_exist(labels, own, count, seed):
    labels = np.array(labels)
    formats = {t: RowFormat(len(teacher.classes), Archive(), 1.0) for t, teacher in enumerate(PYRAMID.teachers)}
    layout = Layout(PYRAMID, np.arange(len(labels)), labels, formats, own, 3)
    pieces = draw(layout, count, seed)
    rows = [(piece.teacher, piece.view, int(sample)) for piece in pieces for sample in piece.ids]
    there = {(t, view, n) for t, teacher in enumerate(PYRAMID.teachers) for view in range(3) for n in range(len(labels))
             if not own or labels[n] in teacher.classes or t == 0}
    assert len(rows) == len(set(rows)) == min(count, len(there)) and set(rows) <= there
    assert all(1 <= len(piece.ids) <= BLOCK for piece in pieces)


@pytest.mark.parametrize("wish", [{}, {"dtype": "int8"}, {"top_k": 3}, {"dtype": "int8", "top_k": 6}])
def test_a_tolerance_forgives_last_bits_and_nothing_else(wish):
    row = RowFormat(9, Archive(**wish), 4.0)
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0)).half() * 4
    stored, near = row.encode(logits), row.encode(logits + 0.004)
    far = row.encode(torch.where(torch.arange(20)[:, None] == 7, logits * 1.5, logits))
    assert not compare(row, stored, stored, 0.0)[0].any() and compare(row, stored, near, 0.0)[0].any()
    assert not compare(row, stored, near, 0.02)[0].any()
    assert compare(row, stored, far, 0.02)[0].nonzero().tolist() == [[7]]


@given(labels=st.lists(st.integers(0, 7), min_size=1, max_size=700), own=st.booleans(), drop=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_every_soft_target_has_one_place_and_no_place_is_empty(labels, own, drop):
    labels = np.array(labels)
    samples = np.arange(len(labels))[drop:] if len(labels) > drop else np.arange(len(labels))
    formats = {t: RowFormat(len(teacher.classes), Archive(), 1.0) for t, teacher in enumerate(PYRAMID.teachers)}
    layout = Layout(PYRAMID, samples, labels, formats, own, 2)
    shapes = [layout.shapes(shard) for shard in range(layout.shards)]
    for t, teacher in enumerate(PYRAMID.teachers):
        asked = samples if not own or t == 0 else samples[np.isin(labels[samples], teacher.classes)]
        shard, row = layout.locate(t, asked)
        held = [np.isin(asked, layout.samples(k)) for k in range(layout.shards)]
        for k in range(layout.shards):
            assert (shard[held[k]] == k).all()
            assert sorted(row[held[k]]) == list(range(shapes[k][teacher.name][0]))
            assert shapes[k][teacher.name][1] == len(teacher.classes)
    assert sorted(np.concatenate([layout.samples(k) for k in range(layout.shards)])) == samples.tolist()
    assert layout.per_shard % BLOCK == 0 and layout.files == 2 * layout.shards


rows = st.integers(2, 40).flatmap(lambda width: st.tuples(st.just(width), st.integers(1, 50), st.integers(0, 2**31)))


@given(rows, st.sampled_from(["fp16", "int8"]), st.one_of(st.none(), st.integers(1, 45)), st.sampled_from([1.0, 4.0, 20.0]))
@settings(deadline=None, max_examples=150)
def test_coarse_rows_keep_what_they_promise(shape, dtype, top_k, temperature):
    """int8 errs by half a step; the largest logits keep their places, the others together their probability."""
    width, count, seed = shape
    row = RowFormat(width, Archive(dtype=dtype, top_k=top_k), temperature)
    logits = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3
    logits = (logits - logits.mean(1, keepdim=True)).half()
    stored = row.encode(logits)
    assert stored.shape == (count, row.columns) and stored.dtype == row.dtype
    assert stored[0].numel() * stored.itemsize == row.row_bytes
    found = row.decode(stored)
    assert found.dtype == torch.float16 and found.shape == logits.shape
    alone = row.decode(row.encode(logits[-1:]))
    assert torch.equal(alone[0], found[-1]), "a row does not depend on the others"
    step = (logits.float().amax(1) - logits.float().amin(1)) / 255
    bound = 0.51 * step[:, None] + 0.01 if dtype == "int8" else torch.zeros(count, 1)
    kept = torch.zeros(count, width, dtype=torch.bool)
    kept.scatter_(1, torch.sort(logits.double(), dim=1, descending=True, stable=True).indices[:, :row.kept], True)
    assert ((found.float() - logits.float()).abs() <= bound)[kept].all()
    if row.sparse:
        exact, coarse = (torch.exp(x.double() / temperature) for x in (logits, found))
        ratio = (coarse * ~kept).sum(1) / (exact * ~kept).sum(1)
        assert ((ratio - 1).abs() < 0.02).all()


@pytest.mark.parametrize(("samples", "shards"), [(480, 15), (16_384, 16), (65_536, 64), (1_000_000, 123)])
def test_many_samples_are_in_as_many_shards_as_many_ranks_can_share(samples, shards):
    labels = np.zeros(samples, dtype=np.int64)
    layout = Layout(PYRAMID, np.arange(samples), labels, {0: RowFormat(7, Archive(), 1.0)}, False, 1)
    assert layout.shards == shards and layout.per_shard <= 8192
    assert sum(len(layout.samples(shard)) for shard in range(shards)) == samples
