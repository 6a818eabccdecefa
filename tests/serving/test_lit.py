"""What fastres.serving changes in LitServe, without a process: LitServe's own code around it."""

import asyncio
import queue
import time

import pytest

pytest.importorskip("litserve")
from litserve.utils import LitAPIStatus

from fastres.serving import Guard, api
from fastres.serving.lit import Server

PATH = "/predict"


@pytest.fixture
def server():
    """A server that takes requests and has no worker."""
    network = api("resnet18", max_batch=4, batch_wait=0.02)
    server = Server(network, print, accelerator="cpu", devices=1, timeout=1)
    server.litapi_request_queues[PATH] = queue.Queue()
    server.app.response_queue_id = 0
    return server


async def post(server, answer, deadline=0.1, leaves=None):
    """The status of a request to the server behind a Guard; ``answer`` is the worker's, if any."""
    sent, body = [], [{"type": "http.request", "body": b"photo"}]

    async def receive():
        if body:
            return body.pop()
        await asyncio.sleep(60 if leaves is None else leaves)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": PATH, "method": "POST", "headers": [], "query_string": b""}
    asked = asyncio.create_task(Guard(server.app, deadline=deadline)(scope, receive, send))
    if answer is not None:
        while not server.response_buffer:
            await asyncio.sleep(0.001)
        (item,) = server.response_buffer.values()
        item.response = (answer, LitAPIStatus.OK)
        item.event.set()
    await asked
    return sent[0]["status"] if sent else None


@pytest.mark.parametrize(
    ("answer", "leaves", "status"),
    [({"top": []}, None, 200), (None, None, 504), (None, 0.02, None)],
    ids=["answered", "late", "left"],
)
def test_what_nobody_waits_for_is_forgotten(server, answer, leaves, status):
    """LitServe keeps an entry for each request that was cancelled, until memory is full."""
    assert asyncio.run(post(server, answer, leaves=leaves)) == status
    assert server.litapi_request_queues[PATH].qsize() == 1
    assert server.response_buffer == {}


class Transport:
    def send(self, item, consumer_id):
        pass


def request(n):
    return (0, f"uid {n}", time.monotonic(), b"photo %d" % n)


def batch(server, waiting):
    """The payloads that a worker takes at once."""
    network = server.lit_api
    network.request_timeout = 60
    taken, late = network.loop.get_batch_requests(network, waiting, Transport())
    assert late == []
    return [payload for _, _, payload in taken]


def test_a_worker_takes_what_waits_up_to_the_largest_batch(server):
    waiting = queue.Queue()
    for n in range(6):
        waiting.put(request(n))
    assert batch(server, waiting) == [b"photo %d" % n for n in range(4)]
    assert batch(server, waiting) == [b"photo 4", b"photo 5"]


def test_a_worker_waits_for_the_first_without_asking_again_and_again(server):
    class Counting(queue.Queue):
        asked = 0

        def get(self, *args, **kwargs):
            self.asked += 1
            return super().get(*args, **kwargs)

    waiting = Counting()
    asyncio.run(later(waiting, lambda: batch(server, waiting)))
    assert waiting.asked < 40  # LitServe's own loop asks every millisecond of the 0.3 s


async def later(waiting, take):
    taking = asyncio.create_task(asyncio.to_thread(take))
    await asyncio.sleep(0.3)
    waiting.put(request(0))
    await taking


def test_a_batch_is_full_where_more_wait_than_can_be_fetched_in_time(server):
    """Each request is fetched from another process; LitServe stops when the wait is over."""

    class Distant(queue.Queue):
        def get(self, *args, **kwargs):
            time.sleep(0.01)
            return super().get(*args, **kwargs)

    waiting = Distant()
    for n in range(5):
        waiting.put(request(n))
    server.lit_api.batch_timeout = 0.002
    assert batch(server, waiting) == [b"photo %d" % n for n in range(4)]


def test_a_batch_waits_for_others(server):
    server.lit_api.batch_timeout = 5
    waiting, taken = queue.Queue(), []
    waiting.put(request(9))
    waiting.put(request(8))
    waiting.put(request(7))
    asyncio.run(later(waiting, lambda: taken.extend(batch(server, waiting))))
    assert taken == [b"photo %d" % n for n in (9, 8, 7, 0)]


def test_without_a_wait_what_is_there_is_taken(server):
    server.lit_api.batch_timeout = 0
    waiting = queue.Queue()
    waiting.put(request(0))
    waiting.put(request(1))
    assert batch(server, waiting) == [b"photo 0", b"photo 1"]
