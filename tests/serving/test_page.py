"""The page in a real browser, where one is installed: photographs to labels, by mouse and keys.

The server is the page, the Guard and a Predictor in this process; labels are the network's own.
"""

import base64
import shutil
import threading
import time

import pytest
import torch
from fused import small
from servers import free_port, picture
from torch import nn

pytest.importorskip("litserve")
pytest.importorskip("torchvision")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
import fastapi  # noqa: E402
import uvicorn  # noqa: E402
from fastapi.responses import JSONResponse  # noqa: E402
from torchvision.models import ResNet50_Weights  # noqa: E402

import fastres  # noqa: E402
from fastres.serving import Guard, Predictor  # noqa: E402
from fastres.serving.lit import image_in  # noqa: E402
from fastres.serving.serve import show_page  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed"),
]
NAMES = ["<b>ant</b>", "bee", "cat", "dog", "a label so long that no line of the page can hold it"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    preset = ResNet50_Weights.IMAGENET1K_V1.transforms()
    whole = nn.Sequential(fastres.Normalize.like(preset), small(stem="imagenet")).eval()
    example = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    fastres.save(fastres.optimize(whole, example_input=example), folder / "fused.safetensors")
    (folder / "names.txt").write_text("\n".join(NAMES))
    return Predictor(str(folder / "fused.safetensors"), labels=folder / "names.txt")


@pytest.fixture(scope="module")
def address(predictor):
    app = fastapi.FastAPI()
    app.add_middleware(Guard, max_body=1_000_000)
    app.add_api_route("/ui", show_page)

    @app.get("/info")
    def info():
        state = {"model": "/models/fused.safetensors", "dtype": "float32", "classes": 5}
        return {"model": {**state, "device": "cpu"}}

    @app.post("/predict")
    async def predict(request: fastapi.Request):
        (answer,) = predictor.many([await image_in(request)])
        return JSONResponse(answer, 422 if "error" in answer else 200)

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/ui"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        shown = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield shown
        shown.close()


@pytest.fixture
def page(browser, address):
    """The page; an error in its script or a request to another host fails the test."""
    page = browser.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Refused" in said.text else None)
    page.on("request", lambda r: None if r.url.startswith(OWN(address)) else wrong.append(r.url))
    page.goto(address)
    yield page
    page.close()
    assert wrong == []


def OWN(address):
    return (address.removesuffix("/ui"), "blob:", "data:")


def photo(seed=0, name="photo.jpg", data=None):
    return {"name": name, "mimeType": "image/jpeg", "buffer": data or picture(seed)}


def labels(page):
    page.wait_for_selector("#answer[aria-busy=false]")
    return [tuple(text.split("\n")) for text in page.locator("#labels li").all_inner_texts()]


def wanted(predictor, seed=0):
    (answer,) = predictor.many([picture(seed)])
    return [(one["label"], f"{100 * one['probability']:.1f} %") for one in answer["top"]]


def test_a_photograph_gets_its_five_labels(page, predictor):
    page.set_input_files("#file", photo())
    assert labels(page) == wanted(predictor)
    assert "320 × 240 pixels" in page.inner_text("#status")
    assert page.is_visible("#photo")
    assert not page.is_visible("#error")
    model = playwright.expect(page.locator("#model"))
    model.to_have_text("fused.safetensors, float32 on cpu, 5 classes")


def test_junk_gets_an_error_line_and_the_next_one_labels(page, predictor):
    page.set_input_files("#file", photo(data=b"junk"))
    assert labels(page) == []
    assert page.inner_text("[role=alert]") == "cannot read image: cannot identify image file"
    assert not page.is_visible("#photo")
    page.set_input_files("#file", photo(data=bytes(2_000_000)))
    playwright.expect(page.get_by_role("alert")).to_contain_text("more than 1000000 bytes")
    page.set_input_files("#file", photo(1))
    page.wait_for_selector("#labels li")
    assert labels(page) == wanted(predictor, 1)
    assert not page.is_visible("#error")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_photograph_is_dropped_or_pasted(page, predictor, event):
    page.evaluate(
        """([event, data]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "photo.jpg", { type: "image/jpeg" }));
            const options = { bubbles: true, cancelable: true };
            document.getElementById("drop").dispatchEvent(event === "drop"
                ? new DragEvent("drop", { ...options, dataTransfer: transfer })
                : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        }""",
        [event, base64.b64encode(picture()).decode()],
    )
    page.wait_for_selector("#labels li")
    assert labels(page) == wanted(predictor)


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_is_enough(page, predictor, key):
    choosing = []
    page.on("filechooser", lambda chooser: choosing.append(chooser))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    for _ in range(20):  # the browser is told without an answer that the dialog is ours
        page.keyboard.press(key)
        page.wait_for_timeout(200)
        if choosing:
            break
    choosing[0].set_files(photo())
    page.wait_for_selector("#labels li")
    assert labels(page) == wanted(predictor)


def test_a_reader_of_the_screen_gets_names_and_news(page):
    assert page.get_by_label("Drop a photograph here").get_attribute("type") == "file"
    assert page.get_by_role("status").inner_text() == "No photograph yet."
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_attribute("html", "lang") == "en"


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(browser, address, scheme):
    """4.5 to 1 for text, 3 to 1 for the border of what is operated (WCAG 2.1 AA)."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    style = "getComputedStyle(document.documentElement)"

    def colour(name):
        value = page.evaluate(f"{style}.getPropertyValue('--{name}').trim()")
        return luminance([int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)])

    def contrast(one, other):
        dark, light = sorted((colour(one), colour(other)))
        return (light + 0.05) / (dark + 0.05)

    texts = (("ink", "ground"), ("ink", "card"), ("ink", "bar"), ("soft", "ground"))
    for pair in (*texts, ("soft", "card"), ("bad", "bad-ground")):
        assert contrast(*pair) >= 4.5, pair
    for pair in (("line", "card"), ("line", "ground"), ("accent", "ground")):
        assert contrast(*pair) >= 3, pair
    page.close()


def test_where_the_server_is_gone_the_page_says_so(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.route("**/predict", lambda route: route.abort())
    page.set_input_files("#file", photo())
    page.wait_for_selector("[role=alert]:not([hidden])")
    assert page.inner_text("[role=alert]") == "the server cannot be reached"
    page.close()
