"""The web demo: a real server on 127.0.0.1 with the embedded networks, its visitors, and the folder of the Space."""

import gc
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from huggingface_hub import metadata_load
from PIL import Image

import timm_convmix
from timm_convmix import cli
from timm_convmix.demo import MAX_PIXELS, PREDICTED, open_upload, probabilities
from timm_convmix.errors import InputError
from timm_convmix.inspection import Classifier, weigh_taps
from timm_convmix.prediction import default_model, predict

gradio = pytest.importorskip("gradio", reason="Gradio is not installed")
gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "space"
PHOTOGRAPHS = sorted((ROOT / "examples" / "images").glob("*.jpg"))
MODEL = default_model()
BASELINE = f"{MODEL}_baseline"
pytestmark = [
    pytest.mark.skipif(MODEL is None, reason="no trained model is embedded"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SERVER = """
import os, signal, sys

def stay_here(event, args):
    named = dict([("socket.connect", args[1:2]), ("socket.getaddrinfo", args[:1])]).get(event, ())
    for host in (each[0] if isinstance(each, tuple) else each for each in named):
        if host not in (None, "127.0.0.1", "localhost", b"127.0.0.1"):
            sys.stderr.write(f"{event} of {args}")
            sys.stderr.flush()
            os._exit(70)

sys.addaudithook(stay_here)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would ignore
from timm_convmix.cli import main
sys.exit(main(sys.argv[1:]))
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(address, data=None, kind="application/json"):
    """Status and body of an answer."""
    request = urllib.request.Request(address, data, {"content-type": kind})  # noqa: S310
    try:
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(autouse=True)
def collect():
    """Close what Gradio leaves open where its warnings are ignored, in here."""
    yield
    gc.collect()


def test_equal_labels_are_told_apart():
    classifier = Classifier.load(MODEL)
    image = Image.open(PHOTOGRAPHS[0]).convert("RGB")
    own = probabilities(classifier, image)
    classifier.labels[:] = ["crane"] * 9 + ["cat"]
    shared = probabilities(classifier, image)
    assert list(shared.values()) == list(own.values())
    assert all(name == "cat" or name.startswith("crane (") for name in shared)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The command in a process that dies of any connection out of this machine; at the end, how it left."""
    folder, port = tmp_path_factory.mktemp("demo"), free_port()
    given = ["demo", "--port", str(port), "--max-megabytes", "1", "--examples", PHOTOGRAPHS[0].parent]
    given += ["--model", MODEL, BASELINE]
    env = os.environ | dict(GRADIO_TEMP_DIR=str(folder / "uploads"), PYTHONPATH=str(ROOT))
    with (folder / "stderr").open("w+") as stderr:
        process = subprocess.Popen([sys.executable, "-c", SERVER, *given], env=env, stderr=stderr)
        address = f"http://127.0.0.1:{port}/"
        while process.poll() is None:
            try:
                ask(address)
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield SimpleNamespace(address=address, visit=lambda: gradio_client.Client(address, verbose=False))
        process.send_signal(signal.SIGINT)
        status = process.wait(120)
        stderr.seek(0)
        first, *others = stderr.read().splitlines()
        assert (status, first) == (130, f"timm-convmix demo: {address} (Ctrl-C ends it)"), others


def look(client, image, wanted=PREDICTED, model=MODEL):
    """Ask for what the page shows of an image."""
    return client.submit(gradio_client.handle_file(image), model, wanted, api_name="/look")


def shown(job):
    """The top of both networks, the maps, the taps."""
    ours, baseline, maps, taps = job.result()
    tops = [[(row["label"], row["confidence"]) for row in top["value"]["confidences"]] for top in (ours, baseline)]
    return tops, maps["plot"], taps["data"]


def test_a_visitor_sees_what_the_library_finds(server):
    tops, maps, taps = shown(look(server.visit(), PHOTOGRAPHS[0]))
    for top, name in zip(tops, [MODEL, BASELINE], strict=True):
        rows = predict(PHOTOGRAPHS[0], model=name, quiet=True)
        assert [label for label, _ in top] == [row["label"] for row in rows]
        assert [value for _, value in top] == pytest.approx([row["probability"] for row in rows], abs=1e-4)
    assert maps.startswith("data:image/webp;base64,")
    wanted = [row["logit_drop"] for row in weigh_taps(PHOTOGRAPHS[0]) if row["file"]]
    assert [float(drop) for _, drop in taps] == pytest.approx(wanted, abs=1e-3)


def test_a_plain_backbone_stands_alone(server):
    top, beside, maps, _ = look(server.visit(), PHOTOGRAPHS[0], model=BASELINE).result()
    assert top["label"] == BASELINE
    assert beside["visible"] is False
    assert maps["plot"].startswith("data:image/webp;base64,")


def test_visitors_at_once_see_what_each_would_see_alone(server):
    asked = [(photograph, wanted) for photograph in PHOTOGRAPHS for wanted in (PREDICTED, 5)]
    jobs = [look(server.visit(), *each) for each in asked]
    together = [shown(job) for job in jobs]
    client = server.visit()
    assert together == [shown(look(client, *each)) for each in asked]
    assert len({maps for _, maps, _ in together}) > len(PHOTOGRAPHS)


def test_what_is_no_image_is_refused_in_one_line(server, tmp_path):
    files = dict(text=b"not an image", empty=b"", cut=PHOTOGRAPHS[0].read_bytes()[:5000])
    for name, content in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
        with pytest.raises(gradio_client.exceptions.AppError) as caught:
            look(server.visit(), tmp_path / f"{name}.jpg").result()
        assert str(caught.value).startswith(f"{name}.jpg: ")
        assert "\n" not in str(caught.value)
        assert "/" not in str(caught.value)


def test_no_file_of_the_server_is_reached_and_no_address(server, tmp_path):
    for path in ("/etc/passwd", ROOT / "pyproject.toml", "http://127.0.0.1:9/a.png", "https://example.com/a.png"):
        status, _ = ask(f"{server.address}gradio_api/file={path}")
        assert status == 403, path
        body = dict(data=[dict(path=str(path), meta={"_type": "gradio.FileData"}), MODEL, PREDICTED])
        status, answer = ask(f"{server.address}gradio_api/call/look", json.dumps(body).encode())
        if status == 200:
            _, answer = ask(f"{server.address}gradio_api/call/look/{json.loads(answer)['event_id']}")
            assert answer.startswith("event: error")
        else:
            assert (status, str(path).startswith("http")) == (403, True)
        assert "root:" not in answer
    status, _ = ask(f"{server.address}gradio_api/run/look", json.dumps(body | dict(data=[None, MODEL, -1])).encode())
    assert status == 404  # past the queue
    large = tmp_path / "large.png"
    large.write_bytes(bytes(1_500_000))
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        look(server.visit(), large).result()


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_convmix.demo.read_image", None)
    for width, height in ((9000, 9000), (30000, 30000)):
        Image.new("1", (width, height)).save(tmp_path / "large.png")
        with pytest.raises(InputError, match=f"large.png has more than {MAX_PIXELS:,} pixels"):
            open_upload(tmp_path / "large.png")


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    """Headless Chromium, which logs what it asks for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = map(shutil.which, ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("Chromium, or its driver, is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1500"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


def test_two_visitors_and_a_bad_file_in_a_browser(server, browser, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")

    def once(find):
        """What a page shows as soon as it does."""
        deadline = time.monotonic() + 600
        while not (found := find()):
            assert time.monotonic() < deadline, browser.find_element("tag name", "body").text
            time.sleep(0.2)
        return found

    pages = {}
    for file in (*PHOTOGRAPHS, text):
        browser.switch_to.new_window("tab")
        browser.get(server.address)
        once(lambda: browser.find_elements("css selector", "input[type=file]"))[0].send_keys(str(file))
        pages[file] = browser.current_window_handle
    maps = set()
    for photograph in PHOTOGRAPHS:
        browser.switch_to.window(pages[photograph])
        picture = once(lambda: browser.find_elements("css selector", "img[src^='data:image/webp']"))[0]
        maps.add(picture.get_attribute("src"))
        assert picture.size["width"] > 800
        page = browser.find_element("tag name", "body").text
        assert f"{predict(photograph, topk=1, quiet=True)[0]['label']}\n" in page
        assert "stages.0" in page
    assert len(maps) == len(PHOTOGRAPHS)
    browser.switch_to.window(pages[text])
    once(lambda: "text.jpg: cannot identify image file" in browser.find_element("tag name", "body").text)

    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in log if entry["method"] == "Network.requestWillBeSent"]
    assert asked.count(server.address) == len(pages)
    assert {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}


# The command ----------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["demo", "--port", str(port)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"timm-convmix demo: nothing can listen at 127.0.0.1:{port}")
    assert captured.err.count("\n") == 1


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo"]) == 1
    captured = capsys.readouterr()
    wanted = "timm-convmix demo: the demo needs gradio: pip install 'timm-convmix[demo]'.\n"
    assert (captured.out, captured.err) == ("", wanted)


# The Space ------------------------------------------------------------------------------------------------------------


def test_the_space_is_what_its_card_says():
    card = metadata_load(SPACE / "README.md")
    requirements = dict(line.split("==") for line in (SPACE / "requirements.txt").read_text().splitlines())
    assert (card["sdk"], card["sdk_version"]) == ("gradio", requirements["gradio"])
    assert requirements["timm-convmix"] == timm_convmix.__version__
    needed = {line.split(">")[0] for line in metadata.requires("timm-convmix") if "extra ==" not in line}
    assert {name.replace("-", "_") for name in needed} <= {*requirements}
    assert isinstance(runpy.run_path(str(SPACE / card["app_file"]))["demo"], gradio.Blocks)


def test_the_space_has_the_photographs():
    assert {path.name: path.read_bytes() for path in (SPACE / "examples").iterdir()} == {
        path.name: path.read_bytes() for path in PHOTOGRAPHS
    }
