"""What docs/serving.md promises, on servers in processes of their own: loopback only.

Everything that one server can show is one test, since a start costs seconds.
"""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from fused import small
from torch import nn

pytest.importorskip("litserve")
pytest.importorskip("torchvision")
from PIL import Image
from servers import Server, picture
from torchvision.models import ResNet50_Weights

import fastres

NAMES = ("ant", "bee", "cat", "dog", "eel")
DEADLINE = 5.0
OPTIONS = ("--workers", "1", "--max-batch", "8", "--batch-wait", "20ms", "--deadline", "5s")
LIMITS = ("--max-queue", "110", "--max-body", "2MB", "--top", "3")


@pytest.fixture(scope="module")
def network():
    return small(stem="imagenet")


@pytest.fixture(scope="module")
def arguments(network, tmp_path_factory):
    """Of a server of a fused file that takes bytes, with names for its classes."""
    folder = tmp_path_factory.mktemp("model")
    preset = ResNet50_Weights.IMAGENET1K_V1.transforms()
    whole = nn.Sequential(fastres.Normalize.like(preset), network).eval()
    example = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    fastres.save(fastres.optimize(whole, example_input=example), folder / "fused.safetensors")
    (folder / "names.txt").write_text("\n".join(NAMES))
    options = (*OPTIONS, *LIMITS, "--labels", str(folder / "names.txt"))
    return [str(folder / "fused.safetensors"), *options]


@pytest.mark.slow
@pytest.mark.fault(90, 91)
def test_what_is_promised_holds(arguments, network, tmp_path):
    with Server(arguments) as server:
        it_says_what_it_serves(server, arguments)
        its_answers_are_those_of_pytorch(server, network, tmp_path)
        a_bad_image_in_a_batch_is_an_error_for_it_alone(server)
        a_large_body_is_refused_without_being_kept(server)
        uploads_that_stall_are_ended_and_hinder_nobody(server)
        nothing_is_dropped_where_more_come_than_wait(server)
        a_client_that_leaves_frees_its_place(server)
        a_worker_that_is_killed_is_replaced(server)
        what_is_under_way_is_answered_at_the_end(server, lambda: server.process.terminate())


def it_says_what_it_serves(server, arguments):
    assert server.state["url"] == f"http://127.0.0.1:{server.port}"
    assert (server.state["workers"], server.state["classes"]) == (1, 5)
    assert server.ask("/info").json()["model"]["model"] == arguments[0]
    page = server.ask("/ui")
    assert page.status == 200
    assert b"<main" in page.body
    assert "default-src 'none'" in page.headers["content-security-policy"]
    wrong = server.ask("/predict")
    assert (wrong.status, wrong.json()) == (405, {"error": "Method Not Allowed"})


def its_answers_are_those_of_pytorch(server, network, folder):
    """By torchvision's own preprocessing, and as a form as well as a bare body."""
    file = folder / "photo.jpg"
    file.write_bytes(picture())
    image = ResNet50_Weights.IMAGENET1K_V1.transforms()(Image.open(file))
    with torch.inference_mode():
        wanted = network(image[None]).softmax(1)[0].topk(3)
    form = (
        b"--x\r\ncontent-disposition: form-data; name=file; filename=a.jpg\r\n\r\n%s\r\n--x--\r\n"
    )
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for answer in (
        server.ask(body=picture()),
        server.ask(body=form % picture(), headers=kind),
    ):
        assert answer.status == 200, answer.body
        found = answer.json()
        assert (found["width"], found["height"]) == (320, 240)
        assert [one["index"] for one in found["top"]] == wanted.indices.tolist()
        assert [one["label"] for one in found["top"]] == [NAMES[i] for i in wanted.indices]
        for one, value in zip(found["top"], wanted.values.tolist(), strict=True):
            assert abs(one["probability"] - value) < 1e-4
    other = server.ask(body=form.replace(b"name=file", b"name=photo") % picture(), headers=kind)
    assert (other.status, "'file'" in other.json()["error"]) == (422, True)


def a_bad_image_in_a_batch_is_an_error_for_it_alone(server):
    held = threading.Thread(target=server.ask, kwargs={"body": picture(sleep=1)})
    held.start()  # so that the next ones wait and are taken together
    time.sleep(0.3)
    bodies = [picture(seed) for seed in range(7)] + [b"junk"]
    answers = server.ask_all(bodies)
    held.join()
    assert [answer.status for answer in answers] == [200] * 7 + [422]
    assert answers[-1].json() == {"error": "cannot read image: cannot identify image file"}
    assert {answer.headers["batch-size"] for answer in answers} == {"8"}
    assert server.metric('fastres_requests_total{code="422"}') == 2
    for body in (b"", picture()[:2000]):
        assert server.ask(body=body).status == 422


def memory(pid):
    """Bytes that a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def a_large_body_is_refused_without_being_kept(server):
    before = memory(server.listener())
    answer = server.ask(body=bytes(100_000_000))
    assert (answer.status, answer.json()) == (
        413,
        {"error": "the body has more than 2000000 bytes"},
    )
    assert memory(server.listener()) - before < 30e6


def uploads_that_stall_are_ended_and_hinder_nobody(server):
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\nabc"
    stalled = []
    for _ in range(100):
        stalled.append(socket.create_connection(("127.0.0.1", server.port), DEADLINE * 4))
        stalled[-1].sendall(head)
    server.until(lambda: server.metric("fastres_requests_active") == 100)
    assert [answer.status for answer in server.ask_all([picture()] * 8)] == [200] * 8
    for connection in stalled:
        said = b"".join(iter(lambda connection=connection: connection.recv(4096), b""))  # closed
        assert said.startswith(b"HTTP/1.1 408 ")
    assert server.metric("fastres_requests_active") == 0


def nothing_is_dropped_where_more_come_than_wait(server):
    held = threading.Thread(target=server.ask, kwargs={"body": picture(sleep=1)})
    held.start()
    time.sleep(0.3)
    answers = server.ask_all([picture(size=(40, 40))] * 160)
    held.join()
    refused = [answer for answer in answers if answer.status == 503]
    assert refused
    assert len(refused) + sum(answer.status == 200 for answer in answers) == 160
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert "110 requests" in refused[0].json()["error"]


def a_client_that_leaves_frees_its_place(server):
    body = picture(sleep=1)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        client.sendall(head + body)
        server.until(lambda: server.metric("fastres_requests_active") == 1)
    assert server.until(lambda: server.metric("fastres_requests_active") == 0) < 0.7
    assert server.metric('fastres_requests_total{code="499"}') == 1
    assert server.ask(body=picture()).status == 200


def a_worker_that_is_killed_is_replaced(server):
    (worker,) = server.workers()
    killed = []

    def kill():
        os.kill(worker, signal.SIGKILL)
        killed.append(server.until(lambda: server.ask("/health").status == 503))

    answers = server.ask_all([picture(sleep=2)] * 3, then=kill)
    assert killed[0] < 3
    assert {answer.status for answer in answers} == {504}
    assert max(answer.seconds for answer in answers) < DEADLINE + 2
    server.until(lambda: server.ask("/health").status == 200)
    assert server.ask(body=picture()).status == 200
    assert server.workers() != [worker]


def what_is_under_way_is_answered_at_the_end(server, end):
    answers = server.ask_all([picture(sleep=1)] * 8, then=end)
    assert [answer.status for answer in answers] == [200] * 8
    assert server.ended() == 0
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", server.port)) != 0


@pytest.mark.sweep
@pytest.mark.fault(91)
def test_control_c_reaches_all_processes_and_loses_nothing(arguments):
    """As a terminal sends it: to the group."""
    with Server(arguments) as server:
        end = lambda: os.killpg(server.process.pid, signal.SIGINT)  # noqa: E731
        what_is_under_way_is_answered_at_the_end(server, end)


@pytest.mark.sweep
@pytest.mark.fault(91)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_workers_load_leaves_none(arguments, number, code):
    with Server(arguments, wait=False) as server:
        server.until(lambda: server.workers())
        server.process.send_signal(number)
        assert server.ended() == code


@pytest.mark.sweep
@pytest.mark.fault(91)
def test_a_server_that_takes_no_more_requests_ends(arguments):
    with Server(arguments) as server:
        os.kill(server.listener(), signal.SIGKILL)
        assert server.ended() == 2
        assert b"the process that takes requests ended with exit code -9" in b"".join(server.errors)


@pytest.mark.sweep
@pytest.mark.fault(91)
def test_a_worker_that_dies_while_it_loads_is_no_endless_wait(arguments):
    with Server(arguments, wait=False) as server:
        server.until(lambda: server.workers())
        os.kill(server.workers()[0], signal.SIGKILL)
        assert server.ended() == 2
        assert b"a worker ended with exit code -9 before it was ready" in b"".join(server.errors)
