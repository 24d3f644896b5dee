"""Agreement: which steps run after a vote, for any window, interval and stretch."""

import threading

import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import free_port

from pkd.ballot import Ballot, Vote


def play(ballot, first, last, window, ahead, votes):
    """One rank's loop over a stretch; ahead: whether it posts as students do. Returns the steps run and what it saw."""
    ran, posted, decided = [], [], {}
    ballot.open(first, last)
    for step in range(first, last):
        if not ballot.permit(step):
            break
        ballot.cast(step, votes.get(step, Vote()))
        if ahead and step + window < last and ballot.permit(step + window):
            posted.append(step + window)
        ran.append(step)
        after = ballot.after(step)
        if after != Vote():
            decided[step] = after
    return ran, posted, decided, ballot.close()


@given(window=st.integers(1, 5), every=st.integers(1, 4), first=st.integers(0, 7), length=st.integers(0, 30),
       asked=st.integers(0, 40))
@settings(deadline=None, max_examples=300)
def test_a_stop_takes_effect_window_plus_one_steps_after_its_ballot(window, every, first, length, asked):
    last = first + length
    ballot = Ballot(None, window, every)
    ran, posted, _, closing = play(ballot, first, last, window, True, {asked: Vote(stop=True)})
    is_ballot = first <= asked < last and (asked - first) % every == 0
    end = min(last, asked + window + 2) if is_ballot else last
    assert ran == list(range(first, end))
    assert set(posted) <= set(ran), "nothing is posted that does not run"
    assert closing.stop == is_ballot


@given(window=st.integers(1, 5), every=st.integers(1, 4), save=st.integers(0, 30))
@settings(deadline=None, max_examples=100)
def test_a_save_is_decided_for_one_moment(window, every, save):
    ballot = Ballot(None, window, every)
    _, _, decided, closing = play(ballot, 0, 30, window, True, {save: Vote(save=True)})
    moment = save + window + 1
    assert decided == ({moment: Vote(save=True)} if save % every == 0 and moment < 30 else {})
    assert closing.save == (save % every == 0 and save < 30)


@given(window=st.integers(1, 5), every=st.integers(1, 4), due=st.integers(0, 30))
@settings(deadline=None, max_examples=100)
def test_who_asks_for_a_save_until_it_happens_gets_one(window, every, due):
    class Clock(dict):  # of a rank that asks from step `due` on, until a save has happened
        def get(self, step, default):
            return Vote(save=True) if step >= due and not any(moment < step for moment in happened) else default

    class Recording(Ballot):
        def after(self, step):
            vote = super().after(step)
            if vote.save:
                happened.append(step)
            return vote
    happened: list[int] = []
    play(Recording(None, window, every), 0, 40, window, True, Clock())
    first = -(-due // every) * every + window + 1
    assert happened == ([first] if first < 40 else [])


def test_all_have_begun_once_a_second_vote_is_known():
    ballot = Ballot(None, 3, 2)
    ballot.open(0, 20)
    began = []
    for step in range(20):
        assert ballot.permit(step)
        began.append(ballot.all_began)
        ballot.cast(step, Vote())
    assert began.index(True) == 7 and all(began[7:]), "the vote of step 2 is what the permit of step 2 + 3 + 2 depends on"
    ballot.close()
    ballot.open(0, 2)
    assert ballot.all_began, "what was compiled once stays so, however short the epochs are"


def test_in_short_epochs_all_have_begun_when_the_first_is_over():
    ballot = Ballot(None, 4, 1)
    ballot.open(0, 2)
    for step in range(2):
        assert ballot.permit(step) and not ballot.all_began
        ballot.cast(step, Vote())
    ballot.close()
    assert ballot.all_began


def test_the_earliest_loss_that_was_not_finite_is_named():
    ballot = Ballot(None, 1, 1)
    closing = play(ballot, 0, 20, 1, True, {7: Vote(broken=(6, 3)), 8: Vote(broken=(7, 0))})[3]
    assert closing.broken == (6, 3)
    assert Vote.decode(Vote(broken=(123456, 41)).encode()).broken == (123456, 41)


def test_ranks_that_post_and_ranks_that_do_not_agree_over_gloo():
    """Three ranks in threads; one asks to stop, all run the same steps, and nothing is left pending."""
    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, 3, True, wait_for_workers=False)
    results = {}

    def rank(index):
        store = dist.TCPStore("127.0.0.1", port, 3, False)
        group = dist.ProcessGroupGloo(dist.PrefixStore("ballot", store), index, 3)
        ballot = Ballot(group, 2, 1)
        results[index] = play(ballot, 0, 50, 2, index > 0, {9: Vote(stop=True)} if index == 2 else {})
        results[index] += (ballot.maximum([index, -index]),)

    threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [results[index][0] for index in range(3)] == [list(range(13))] * 3
    assert all(results[index][4] == [2, 0] for index in range(3))
    del server  # it had to outlive the ranks
