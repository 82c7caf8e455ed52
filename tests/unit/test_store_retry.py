import pickle
import threading

import pytest

from dr_cloud.store.errors import ObjectExistsError, ObjectMissingError, StoreUnavailableError
from dr_cloud.store.faults import CountingStore, FailingStore, Fault
from dr_cloud.store.objects import open_memory
from dr_cloud.store.retry import RetryingStore


def retried(plan, attempts_max=4):
    """The memory store, failing as planned, under retries that hardly wait."""
    memory = open_memory()
    failing = FailingStore(memory, plan)
    counting = CountingStore(failing)
    return memory, failing, counting, RetryingStore(counting, attempts_max=attempts_max, wait_seconds=0.001)


VERBS = {
    "put": lambda store: store.put_new("new", b"x"),
    "get": lambda store: store.get("old"),
    "size": lambda store: store.size("old"),
    "delete": lambda store: store.delete("old"),
    "list": lambda store: store.list(""),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_temporary_failure_is_tried_again(verb):
    memory, failing, counting, store = retried([Fault(verb, times=3)])
    memory.put_new("old", b"y")
    VERBS[verb](store)
    assert failing.fired == [3]
    assert counting.requests == {verb: 4}


def test_a_range_is_tried_again():
    memory, failing, _, store = retried([Fault("get", times=3)])
    memory.put_new("old", b"0123456789")
    assert store.get_range("old", 8, 4) == b"89"
    assert failing.fired == [3]


@pytest.mark.parametrize("verb", VERBS)
def test_retries_are_bounded(verb):
    memory, failing, counting, store = retried([Fault(verb, times=1000)])
    memory.put_new("old", b"y")
    with pytest.raises(StoreUnavailableError, match="planned fault"):
        VERBS[verb](store)
    assert failing.fired == [4]
    assert counting.requests == {verb: 4}


def test_a_permanent_failure_is_not_tried_again():
    _, failing, counting, store = retried([Fault("put", times=1000, temporary=False)])
    with pytest.raises(StoreUnavailableError):
        store.put_new("new", b"x")
    assert failing.fired == [1]
    assert counting.requests == {"put": 1}


def test_answers_are_not_tried_again():
    memory, _, counting, store = retried([])
    memory.put_new("old", b"y")
    with pytest.raises(ObjectExistsError):
        store.put_new("old", b"y")
    for ask in (store.get, store.size, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(ObjectMissingError):
            ask("gone")
    assert counting.requests == {"put": 1, "get": 2, "size": 1}


def test_a_put_whose_answer_was_lost_succeeds():
    memory, failing, _, store = retried([Fault("put", when="after")])
    store.put_new("new", b"mine")
    assert failing.fired == [1]
    assert memory.get("new") == b"mine"


@pytest.mark.parametrize("others", [b"them", b"longer than mine"])
def test_a_put_that_failed_and_then_meets_anothers_object_says_so(others):
    memory, _, _, store = retried([Fault("put", when="before")])
    memory.put_new("new", others)
    with pytest.raises(ObjectExistsError):
        store.put_new("new", b"mine")
    # What was learned is not kept: from now on "exists" is taken at its word.
    with pytest.raises(ObjectExistsError):
        store.put_new("new", others)


def test_a_lost_answer_is_remembered_when_the_caller_asks_again_later():
    memory, _, _, store = retried([Fault("put", when="after"), Fault("put", skip=1, times=3)])
    with pytest.raises(StoreUnavailableError):
        store.put_new("new", b"mine")
    assert memory.get("new") == b"mine"
    store.put_new("new", memoryview(b"mine"))
    with pytest.raises(ObjectExistsError):
        store.put_new("new", b"mine")


def test_failures_of_one_key_do_not_excuse_another():
    memory, _, _, store = retried([Fault("put", key="one", times=4)])
    with pytest.raises(StoreUnavailableError):
        store.put_new("one", b"x")
    memory.put_new("two", b"x")
    with pytest.raises(ObjectExistsError):
        store.put_new("two", b"x")


def test_sixteen_threads_with_lost_answers_have_one_winner():
    _, failing, _, store = retried([Fault("put", times=6, when="after")], attempts_max=20)
    won = []

    def race(number):
        try:
            store.put_new("one", b"writer %d" % number)
            won.append(number)
        except ObjectExistsError:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failing.fired == [6]
    assert len(won) == 1
    assert store.get("one") == b"writer %d" % won[0]


def test_errors_travel_between_processes_whole():
    error = pickle.loads(pickle.dumps(StoreUnavailableError("what", "do", False)))
    assert (str(error), error.remedy, error.temporary) == ("what", "do", False)
