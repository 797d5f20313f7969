"""The HTML page in a real browser: nothing fails to load, the numbers show, and a phone-wide window suffices."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flatpatch.report.groups import group_runs, read_run
from flatpatch.report.page import make_page
from flatpatch.report.study_page import write_study_page
from tests.report.study_case import make_study
from tests.report_page import make_four, seeded, write_run
from tests.report_records import make_quick_record, make_steps

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Headless Chromium makes no window narrower than about 500 pixels, so the page is measured in a frame.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><body style="margin:0">
<iframe id="page" src="page.html" style="border:0;width:{width}px;height:800px"></iframe>
<pre id="measured"></pre><script>
onload = () => {{
  const inner = document.getElementById("page").contentWindow, page = inner.document;
  for (const details of page.querySelectorAll("details")) details.open = true;
  setTimeout(() => document.getElementById("measured").textContent = JSON.stringify({{
    inner: inner.innerWidth, scroll: page.documentElement.scrollWidth,
    wide: [...page.querySelectorAll(".box")].filter(box => box.scrollWidth > box.clientWidth).length,
    broken: [...page.images].filter(image => !image.complete || image.naturalWidth === 0).length,
    images: page.images.length,
    small: [...page.images].filter(image => image.getBoundingClientRect().width < 560).length,
    unsaid: [...page.querySelectorAll(".box")].filter(box =>
      (box.scrollWidth > box.clientWidth) !== (parseFloat(inner.getComputedStyle(box, "::before").height) > 10)).length,
    split: [...page.querySelectorAll("th, td")].filter(cell => {{
      const walker = page.createTreeWalker(cell, NodeFilter.SHOW_TEXT), range = page.createRange();
      for (let node; (node = walker.nextNode());) for (const word of node.data.matchAll(/[A-Za-z0-9]+/g)) {{
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map(line => line.top)).size > 1) return true;
      }}
      return false;
    }}).map(cell => cell.innerText),
    summaryCut: [...page.querySelectorAll("#summary ~ .box")].some(box => box.scrollWidth > box.clientWidth),
    leaving: [...page.querySelectorAll("main *")].filter(each => !each.closest(".box, pre")
      && each.getBoundingClientRect().right > inner.innerWidth + 1).length,
    summary: [...page.querySelectorAll("#summary ~ .box tbody tr")].map(
      row => [...row.cells].map(cell => cell.innerText)),
    heat: [...page.querySelectorAll("table.heat tbody td")].map(cell => getComputedStyle(cell).backgroundColor),
    heading: page.querySelector("h1").innerText, warned: [...page.querySelectorAll(".warn")].map(w => w.innerText),
  }}), 500);  // what depends on scrolling is known a frame later
}};
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here (looked for {', '.join(BROWSERS)}); Debian: apt-get install chromium")
    return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Serve a folder on this machine; yield it, its address and the list of what was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            asked.append(f"{self.path} {int(code)}")

    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def visit(browser: str, serve: tuple[Path, str, list[str]], page: str, width: int, profile: Path) -> dict[str, Any]:
    """Open a page in a frame of this width; return what was measured, the console's lines and the requests."""
    folder, address, asked = serve
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    asked.clear()
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}"),
        *("--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1280,900"),
        # Whatever is not on this machine is not found, and the console says so.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", f"{address}/frame.html"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured | {"console": [line for line in done.stderr.splitlines() if "CONSOLE" in line], "asked": [*asked]}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    folders = make_four(tmp_path_factory.mktemp("four"))
    tasks = tuple(f"classes {10 * k}-{10 * k + 9}" for k in range(20))
    record = seeded(0, tasks=tasks, method="a-method-with-a-rather-long-name-" + "x" * 60, labels=["off-protocol"])
    record["deviations"] += [{"what": "argument " + "y" * 80, "upstream": "z" * 300, "here": None, "why": "w" * 200}]
    folders.append(write_run(tmp_path_factory.mktemp("wide") / ("name" * 40), record, make_steps(tasks, steps=4)))
    return make_page(group_runs([read_run(folder) for folder in folders]))


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_page_of_many_runs_fits_the_window(
    chromium: str, serve: tuple[Path, str, list[str]], many: str, width: int, tmp_path: Path
) -> None:
    seen = visit(chromium, serve, many, width, tmp_path / "profile")
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] > 0  # the matrix of twenty tasks scrolls in its own box
    assert seen["images"] >= 8
    assert seen["broken"] == seen["small"] == seen["leaving"] == 0
    assert seen["unsaid"] == 0, "a box that goes on says so, and no other does"
    assert seen["split"] == []
    assert not seen["summaryCut"], "every column of the summary is seen without scrolling"
    assert seen["console"] == []
    assert seen["asked"] == ["/frame.html 200", "/page.html 200"]
    rows = [[" ".join(cell.split()) for cell in row] for row in seen["summary"]]
    assert rows[0][1:4] == ["3", "0, 1, 2", "73.00 ± 3.61"]
    assert rows[1][1:4] == ["2", "0, 1", "80.50 ± 0.71"]
    assert len({colour for colour in seen["heat"] if colour != "rgb(255, 255, 255)"}) > 3


def test_page_of_one_run_shows_its_banner(chromium: str, serve: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", make_quick_record(), make_steps(steps=4)))
    seen = visit(chromium, serve, make_page(group_runs([run])), 360, tmp_path / "profile")
    assert seen["scroll"] <= 360
    assert seen["console"] == []
    assert seen["asked"] == ["/frame.html 200", "/page.html 200"]
    assert seen["broken"] == 0
    assert "N-LoRA on quick, order 1" in seen["heading"]
    assert len(seen["warned"]) == 1
    assert "QUICK AND REFERENCE RUN" in seen["warned"][0]


def test_the_browser_does_see_what_is_wrong(chromium: str, serve: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """A page with every fault that the tests above look for."""
    page = (
        '<!DOCTYPE html><h1>faulty</h1><main><div style="width:700px">wide</div></main><div class="box"><img src="http://example.org/a.png">'
        '<img src="missing.png"></div><script>console.error("an error")</script>'
    )
    seen = visit(chromium, serve, page, 360, tmp_path / "profile")
    assert seen["scroll"] > 360
    assert seen["leaving"] > 0
    assert seen["broken"] == 2
    assert "/missing.png 404" in seen["asked"]
    assert any("an error" in line for line in seen["console"])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> str:
    figures = [{"kind": "forest"}, {"kind": "landscape", "panels": ["sam", "task"], "when": ["after"]}]
    return write_study_page(make_study(tmp_path_factory.mktemp("study"), figures=figures)).read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [390, 1280])
def test_page_of_a_study_fits_the_window(
    chromium: str, serve: tuple[Path, str, list[str]], study: str, width: int, tmp_path: Path
) -> None:
    seen = visit(chromium, serve, study, width, tmp_path / "profile")
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["images"] == 3
    assert seen["broken"] == seen["small"] == seen["leaving"] == 0
    assert seen["unsaid"] == 0
    assert seen["split"] == []
    assert seen["console"] == []
    assert seen["asked"] == ["/frame.html 200", "/page.html 200"]
