"""The pages in a real headless Chromium, spoken to through its own DevTools protocol.

One browser serves all tests. Without Chromium they skip: `apt-get install chromium` brings it.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmcl.report import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium"),
    pytest.mark.timeout(120),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
]
ANSWER_S = 60.0


class Browser:
    """A page of a Chromium that reads commands on descriptor 3 and answers on descriptor 4."""

    def __init__(self, profile: Path) -> None:
        to_child, self.commands = os.pipe()
        self.answers, from_child = os.pipe()
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Up and down again: one of the four may itself be 3 or 4.
            preexec_fn=lambda: _wire(to_child, from_child),
            pass_fds=(3, 4),
        )
        os.close(to_child)
        os.close(from_child)
        self.number = 0
        self.received = b""
        self.session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        pages = self.command("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in pages if t["type"] == "page")
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        call = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(call).encode() + b"\0")
        answer = self._receive(lambda m: m.get("id") == self.number)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def _receive(self, is_wanted: Any) -> dict[str, Any]:
        """The first message that is wanted; events before it are kept."""
        end = time.monotonic() + ANSWER_S
        while True:
            while b"\0" in self.received:
                text, _, self.received = self.received.partition(b"\0")
                message: dict[str, Any] = json.loads(text)
                if "id" not in message:
                    self.events.append(message)
                if is_wanted(message):
                    return message
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"chromium did not answer within {ANSWER_S:g} s"
            more = os.read(self.answers, 1 << 20)
            assert more, "chromium has ended"
            self.received += more

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        # The window has a least width of 500; a phone is narrower.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        for address in ("about:blank", page.resolve().as_uri()):
            self.events.clear()
            self.command("Page.navigate", url=address)
            if not any(e["method"] == "Page.loadEventFired" for e in self.events):
                self._receive(lambda m: m.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        found = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Whatever the page has written to the console, and exceptions nobody caught."""
        self.run("0")  # what was said before is here by the time this is answered
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [e for e in self.events if e["method"] in kinds]

    def requests(self) -> list[str]:
        """The address of everything that has been asked for."""
        self.run("0")
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        place = {"x": round(x), "y": round(y), "pointerType": "mouse"}
        self.command("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            press = {"type": kind, "button": "left", "clickCount": 1}
            self.command("Input.dispatchMouseEvent", **press, **place)

    def screenshot(self, path: Path) -> None:
        """The whole page, as high as it is."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        # A browser whose pipe is closed ends by itself.
        os.close(self.commands)
        os.close(self.answers)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _wire(commands: int, answers: int) -> None:
    """In the child, before it becomes Chromium: descriptors 3 and 4 are the two pipes."""
    high = os.dup(commands), os.dup(answers)
    os.dup2(high[0], 3)
    os.dup2(high[1], 4)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_run) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "a run")
    return write_report([folder], folder)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, make_run) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / n, seed=i, pictures=False) for i, n in enumerate(("one", "two"))]
    return write_report(runs, root / "out")


def place_of_row(browser: Browser, row: int) -> tuple[float, float]:
    browser.run(
        "document.querySelector('#agreement svg.points')"
        ".scrollIntoView({block: 'center', behavior: 'instant'})"
    )
    box = browser.run(
        f"document.querySelector('#agreement circle[data-i=\"{row}\"]')"
        ".getBoundingClientRect().toJSON()"
    )
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.parametrize("which", ["page", "comparison"])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_load_without_errors_requests_or_sideways_scrolling(
    browser, request, which, width, dark
) -> None:
    file = request.getfixturevalue(which)
    browser.open(file, width=width, dark=dark)
    assert browser.complaints() == []
    urls = browser.requests()
    assert {u.partition(":")[0] for u in urls} <= {"file", "data"}
    assert len([u for u in urls if u.startswith("file:")]) == 1
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("innerWidth") == width


@pytest.mark.parametrize("width", [400, 500, 1600])
def test_names_of_facts_do_not_run_into_their_values(browser, page, width) -> None:
    browser.open(page, width=width)
    room = browser.run(
        "Math.min(...[...document.querySelectorAll('dl.list dt')].map(t => {"
        " const r = document.createRange(); r.selectNodeContents(t);"
        " return t.nextElementSibling.getBoundingClientRect().left"
        " - r.getBoundingClientRect().right; }))"
    )
    assert room >= 8


def test_paper_is_light_by_day_and_dark_by_night(browser, page) -> None:
    shades = []
    for dark in (False, True):
        browser.open(page, width=800, dark=dark)
        shades.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    light, night = (sum(int(c) for c in s[4:-1].split(",")) for s in shades)
    assert light > 3 * 200
    assert night < 3 * 60


@pytest.mark.parametrize("which", ["page", "comparison"])
@pytest.mark.parametrize("width", [400, 1600])
def test_text_in_figures_stays_readable(browser, request, which, width) -> None:
    browser.open(request.getfixturevalue(which), width=width)
    least = browser.run(
        "Math.min(...[...document.querySelectorAll('svg.chart:not(.inline) text')]"
        ".map(t => parseFloat(getComputedStyle(t).fontSize)"
        " * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)))"
    )
    assert least >= 9.5


def test_pointing_at_an_image_shows_it_and_leaving_hides_it(browser, page) -> None:
    browser.open(page, width=1200)
    browser.point(*place_of_row(browser, 17))
    card = "document.getElementById('card')"
    assert browser.run(f"{card}.hidden") is False
    assert browser.run(f"{card}.querySelector('img').naturalWidth") > 0
    path = browser.run("JSON.parse(document.getElementById('data').textContent).rows[17].path")
    assert path in browser.run(f"{card}.textContent")
    assert browser.run(f"{card}.querySelectorAll('.salient').length") == 1
    browser.point(4, 4)
    assert browser.run(f"{card}.hidden") is True


def test_a_click_keeps_the_image_until_escape(browser, page) -> None:
    browser.open(page, width=1200)
    browser.point(*place_of_row(browser, 30), click=True)
    browser.point(4, 4)
    assert browser.run("document.getElementById('card').hidden") is False
    browser.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert browser.run("document.getElementById('card').hidden") is True


def test_a_filter_dims_the_others_and_states_the_correlation_of_the_rest(browser, page) -> None:
    browser.open(page, width=1200)
    chip = "[...document.querySelectorAll('.chips button')].find(b => b.textContent === 'blur')"
    browser.run(f"{chip}.click()")
    tree = json.loads((page.parent / "results.json").read_text())
    blur = next(p for p in tree["runs"][0]["portions"] if p["name"] == "blur")
    status = browser.run("document.getElementById('status').textContent")
    assert f"{blur['n']} scored images, SRCC {blur['srcc']:.3f}" in status
    lit = browser.run("document.querySelectorAll('#agreement svg circle.p:not(.off)').length")
    assert lit == 2 * blur["n"]
    browser.run(f"{chip}.click()")
    assert browser.run("document.querySelectorAll('circle.off').length") == 0


def test_a_cell_of_the_heat_map_filters_by_distortion_and_level(browser, page) -> None:
    browser.open(page, width=1200)
    browser.run("document.querySelector('td.heat button').click()")
    assert "12 scored images" in browser.run("document.getElementById('status').textContent")


def test_a_name_with_markup_in_it_is_text_and_filters(browser, page) -> None:
    browser.open(page, width=1200)
    chip = (
        "[...document.querySelectorAll('.chips button')].find(b => b.textContent === 'night & fog')"
    )
    browser.run(f"{chip}.click()")
    assert browser.run("document.getElementById('status').textContent").startswith(
        "night & fog: 48"
    )


def test_the_attention_switch_lays_the_maps_over_the_images(browser, page) -> None:
    browser.open(page, width=1200)
    shown = "getComputedStyle(document.querySelector('.gallery .att')).display"
    assert browser.run(shown) == "none"
    browser.run("document.querySelector('input[data-show=show-attention]').click()")
    assert browser.run(shown) == "block"


def test_every_picture_of_the_gallery_is_decoded(browser, page) -> None:
    browser.open(page, width=1200)
    widths = browser.run("[...document.querySelectorAll('.gallery img')].map(i => i.naturalWidth)")
    assert len(widths) == 64
    assert min(widths) > 0


@pytest.fixture(scope="module")
def duels(tmp_path_factory) -> Path:
    """Pairs of images larger and smaller than their place on the page, with a long name."""
    from lmcl.report.gmad import common_pool, find_duels, read_scores, write_duels

    folder = tmp_path_factory.mktemp("gmad")
    rng = np.random.default_rng(0)
    names = [f"a-camera-with-a-long-name/{i:03d}.jpg" for i in range(30)]
    (folder / names[0]).parent.mkdir()
    for i, name in enumerate(names):
        size = (900, 600) if i % 3 else (64, 96)
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize(size).save(folder / name)
    for file in ("first.csv", "second.csv"):
        rows = "".join(f"{n},{rng.normal()},a set mos 0..100,true\n" for n in names)
        (folder / file).write_text("path,score,scale,higher_is_better\n" + rows)
    a, b = common_pool(read_scores(folder / "first.csv"), read_scores(folder / "second.csv"))
    found = [d for x, y in ((a, b), (b, a)) for d in find_duels(x, y, levels=2, tolerance=3.0)]
    return write_duels(found, a, b, levels=2, images=folder, output=folder / "out")


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    from lmcl.inference.inputs import list_items
    from lmcl.inference.scores_file import Row
    from lmcl.inference.sheet import write_sheet

    folder = tmp_path_factory.mktemp("sheet")
    for i in range(24):
        size = ((300, 200), (120, 400), (32, 32))[i % 3]
        Image.new("RGB", size, (10 * i, 90, 60)).save(folder / f"IMG_20240101_{i:06d}_HDR.jpg")
    items = list_items([str(folder)])
    rows = [Row(path=x.path, score=i / 5, quality=i / 24, error="") for i, x in enumerate(items)]
    write_sheet(rows, items, folder / "sheet.html", scale="demo mos 1..5")
    return folder / "sheet.html"


@pytest.mark.parametrize("width", [400, 1600])
def test_pairs_stand_beside_each_other_and_no_image_is_blown_up(browser, duels, width) -> None:
    browser.open(duels, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    pairs = browser.run(
        "[...document.querySelectorAll('.pair')].map(p => [...p.querySelectorAll('img')]"
        ".map(i => { const r = i.getBoundingClientRect();"
        " return [r.left, r.right, r.top, r.width, i.naturalWidth]; }))"
    )
    assert len(pairs) >= 8
    for (l1, r1, t1, w1, n1), (l2, r2, t2, w2, n2) in pairs:
        assert l1 < r1 <= l2 < r2 <= width
        assert t1 == t2
        assert w1 <= n1 + 0.5
        assert w2 <= n2 + 0.5
    if width == 1600:  # there is room for every pixel
        assert max(w for pair in pairs for _, _, _, w, _ in pair) == 560
    assert browser.complaints() == []


@pytest.mark.parametrize(("width", "columns"), [(400, 2), (1600, 8)])
def test_a_contact_sheet_fills_the_page_with_thumbnails(browser, sheet, width, columns) -> None:
    browser.open(sheet, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    places = browser.run(
        "[...document.querySelectorAll('.shot')].map(f => {"
        " const r = f.getBoundingClientRect(); return [r.left, r.top]; })"
    )
    assert len(places) == 24
    assert len({round(x) for x, _ in places}) == columns
    assert browser.run("document.querySelectorAll('nav a').length") == 0
    assert browser.complaints() == []
