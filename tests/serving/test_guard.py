"""The Guard around applications of a few lines, message by message, without a socket."""

import asyncio
import json
import tracemalloc

import pytest

prometheus = pytest.importorskip("prometheus_client")
from fastres.serving.guard import Guard  # noqa: E402


async def echo(scope, receive, send):
    """An application that answers with the body's length, and a batch of 3."""
    body = (await receive())["body"]
    headers = [(b"batch-size", b"3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"%d" % len(body)})


async def never(scope, receive, send):
    await asyncio.Event().wait()


class Client:
    """One request: the messages that its server receives, and what was sent to it."""

    def __init__(self, *bodies, stalls=False, leaves=None, path="/predict"):
        self.messages = [
            {"type": "http.request", "body": body, "more_body": stalls or n < len(bodies)}
            for n, body in enumerate(bodies, 1)
        ]
        self.leaves, self.sent, self.taken = leaves, [], 0
        self.scope = {"type": "http", "path": path, "method": "POST", "headers": []}
        self.scope["query_string"] = b""

    async def receive(self):
        if self.messages:
            self.taken += 1
            return self.messages.pop(0)
        if self.leaves is None:
            await asyncio.Event().wait()
        await asyncio.sleep(self.leaves)
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    async def ask(self, guard):
        await guard(self.scope, self.receive, self.send)
        return self.status, self.body

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self):
        return b"".join(m.get("body", b"") for m in self.sent)

    @property
    def headers(self):
        return dict(self.sent[0]["headers"])


def count(guard, name, **labels):
    """A number that /metrics shows."""

    async def read():
        client = Client(b"", path="/metrics")
        await client.ask(guard)
        return client.body.decode()

    label = "".join(f'{{{key}="{value}"}}' for key, value in labels.items())
    lines = asyncio.run(read()).splitlines()
    return next((float(x.rpartition(" ")[2]) for x in lines if x.startswith(name + label + " ")), 0)


@pytest.mark.parametrize("bodies", [(b"abc",), (b"a", b"", b"bc"), (b"x" * 10,), (b"",)])
def test_the_application_gets_the_whole_body_at_once(bodies):
    guard = Guard(echo, max_body=10)
    status, body = asyncio.run(Client(*bodies).ask(guard))
    assert (status, int(body)) == (200, len(b"".join(bodies)))
    assert count(guard, "fastres_requests_total", code=200) == 1
    assert count(guard, "fastres_batch_size_sum") == 3
    assert count(guard, "fastres_requests_active") == 0


@pytest.mark.fault(90)
@pytest.mark.parametrize("bodies", [(b"x" * 11,), (b"x" * 6, b"x" * 6, b"x" * 6)])
def test_a_large_body_is_refused_when_it_has_been_taken(bodies):
    called = []

    async def app(scope, receive, send):
        called.append(scope)

    guard, client = Guard(app, max_body=10), Client(*bodies)
    status, body = asyncio.run(client.ask(guard))
    assert status == 413
    assert json.loads(body) == {"error": "the body has more than 10 bytes"}
    assert client.taken == len(bodies)
    assert not called


@pytest.mark.fault(90)
def test_a_large_body_is_not_kept_in_memory():
    part = bytes(1_000_000)
    client = Client(*[part] * 40)
    tracemalloc.start()
    assert asyncio.run(client.ask(Guard(echo, max_body=2_000_000)))[0] == 413
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.fault(90)
@pytest.mark.parametrize(("sent", "status"), [(b"abc", 408), (b"x" * 11, 413)])
def test_a_body_that_stalls_is_refused_at_the_deadline(sent, status):
    guard = Guard(never, deadline=0.05, max_body=10)
    client = Client(sent, stalls=True)
    assert asyncio.run(client.ask(guard))[0] == status
    assert client.headers[b"connection"] == b"close"
    assert guard.active == 0


@pytest.mark.fault(90)
def test_an_application_that_does_not_answer_is_cut_at_the_deadline():
    cut = []

    async def app(scope, receive, send):
        try:
            await never(scope, receive, send)
        except asyncio.CancelledError:
            cut.append(True)
            raise

    guard = Guard(app, deadline=0.05)
    status, body = asyncio.run(Client(b"abc").ask(guard))
    assert (status, json.loads(body)) == (504, {"error": "there was no answer within 0.05 s"})
    assert cut
    assert count(guard, "fastres_requests_total", code=504) == 1


@pytest.mark.fault(90)
def test_what_is_too_much_is_refused_and_the_others_are_answered():
    gate = asyncio.Event()

    async def app(scope, receive, send):
        await gate.wait()
        await echo(scope, receive, send)

    async def run():
        clients = [Client(b"a", b"b") for _ in range(5)]
        asked = [asyncio.create_task(client.ask(guard)) for client in clients]
        await asyncio.sleep(0.02)
        refused = [client for client in clients if client.sent]
        gate.set()
        await asyncio.gather(*asked)
        return clients, refused

    guard = Guard(app, limit=3)
    clients, refused = asyncio.run(run())
    assert sorted(client.status for client in clients) == [200, 200, 200, 503, 503]
    assert [client.headers[b"retry-after"] for client in refused] == [b"1", b"1"]
    assert all(client.taken == 2 for client in refused)
    assert count(guard, "fastres_requests_total", code=503) == 2
    assert asyncio.run(Client(b"abc").ask(guard))[0] == 200  # places are free again


@pytest.mark.fault(90)
def test_a_client_that_leaves_frees_its_place():
    async def run():
        first = Client(b"a", leaves=0.02)
        await asyncio.wait_for(first.ask(guard), 5)
        return first

    guard = Guard(never, limit=1, deadline=60)
    assert asyncio.run(run()).sent == []
    assert guard.active == 0
    assert count(guard, "fastres_requests_total", code=499) == 1


@pytest.mark.fault(90)
def test_a_client_that_leaves_while_it_uploads_is_no_error():
    client = Client(b"abc", stalls=True, leaves=0.01)
    guard = Guard(echo)
    assert asyncio.run(client.ask(guard)) == (None, b"")
    assert count(guard, "fastres_requests_total", code=499) == 1


def test_work_after_the_answer_is_not_cut_as_the_client_leaves():
    after = []

    async def app(scope, receive, send):
        await echo(scope, receive, send)
        await asyncio.sleep(0.05)
        after.append(True)

    asyncio.run(Client(b"a", leaves=0.01).ask(Guard(app)))
    assert after


def test_an_answer_that_has_begun_is_not_followed_by_a_refusal():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await never(scope, receive, send)

    client = Client(b"a")
    asyncio.run(client.ask(Guard(app, deadline=0.05)))
    assert [message["type"] for message in client.sent] == ["http.response.start"]


def test_an_error_of_the_application_stays_its_own():
    async def app(scope, receive, send):
        raise KeyError("mine")

    guard = Guard(app)
    with pytest.raises(KeyError, match="mine"):
        asyncio.run(Client(b"a").ask(guard))
    assert guard.active == 0
    assert count(guard, "fastres_requests_total", code=500) == 1


def test_other_paths_and_protocols_pass_untouched():
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["type"], receive, send))

    guard, client = Guard(app, limit=0), Client(b"a", path="/other")
    asyncio.run(client.ask(guard))
    asyncio.run(guard({"type": "lifespan"}, client.receive, client.send))
    assert seen == [
        ("http", client.receive, client.send),
        ("lifespan", client.receive, client.send),
    ]


def test_two_guards_have_metrics_of_their_own():
    first, second = Guard(echo), Guard(echo, path="/other")
    asyncio.run(Client(b"a").ask(first))
    assert count(first, "fastres_requests_total", code=200) == 1
    assert count(second, "fastres_requests_total", code=200) == 0
