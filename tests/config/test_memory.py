"""What is kept in memory: within a budget, the longest unused dropped first, made once."""

import gc
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from rdopt.config.memory import MACHINE_SHARE, Cache, memory_budget
from rdopt.config.parallel import bounded_map, on_cores


class Owner:
    """Something that asks."""


def kilobytes(n):
    return {"x": np.zeros(1000 * n, np.uint8)}


def test_a_budget_is_what_is_asked_for_or_a_share_of_the_machine():
    assert memory_budget(1.5) == 3 * 2**29
    assert 2**28 < memory_budget(None) < 2**46 and MACHINE_SHARE < 1


def test_the_longest_unused_is_made_again_once_the_budget_is_spent():
    cache, owner, made = Cache(3000), Owner(), []

    def ask(key):
        return cache.get(owner, key, lambda: made.append(key) or kilobytes(1))

    for key in "abc":
        ask(key)
    ask("a")
    ask("d")  # b goes
    for key in "acd":
        ask(key)
    assert made == list("abcd")
    ask("b")
    assert made == list("abcdb")


def test_what_belongs_to_an_owner_goes_with_it():
    cache, kept = Cache(1500), Owner()
    gone = Owner()
    cache.get(gone, "x", lambda: kilobytes(1))
    del gone
    gc.collect()
    cache.get(kept, "x", lambda: kilobytes(1))
    assert cache.get(kept, "x", lambda: pytest.fail("made again")) is not None


def test_threads_that_ask_at_once_wait_for_the_one_that_makes():
    cache, owner, made, begun = Cache(2**20), Owner(), [], threading.Event()

    def slow():
        begun.set()
        made.append(1)
        threading.Event().wait(0.05)
        return kilobytes(1)

    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.get(owner, "x", slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and all(x is found[0] for x in found)


def test_a_value_that_cannot_be_made_is_not_kept():
    cache, owner = Cache(2**20), Owner()
    with pytest.raises(ZeroDivisionError):
        cache.get(owner, "x", lambda: 1 / 0)
    assert cache.get(owner, "x", lambda: "made") == "made"


def test_a_bounded_map_takes_few_items_ahead_and_keeps_their_order():
    from concurrent.futures import ThreadPoolExecutor

    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        for i, x in enumerate(bounded_map(pool, lambda i: i * i, items(), limit=3)):
            assert x == i * i and len(taken) <= i + 3
    assert len(taken) == 20


def test_blas_keeps_to_one_thread_inside_threads_of_ours():
    def threads():
        return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}

    before = threads()
    with on_cores(2) as pool:
        assert pool.submit(threads).result() <= {1}
    assert threads() == before
