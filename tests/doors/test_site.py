"""The built site in a browser: no errors, no request to another host, pictures, formulas, search, dark mode, phone width, links."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from check import find_browser

SITE = Path(__file__).resolve().parents[2] / "_site"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no _site: run `make docs` first"),
]


def notebook_pages(paper: bool) -> list[str]:
    """Pages of notebooks, of papers or of the core."""
    pages = [p.relative_to(SITE / "_sources").with_suffix(".html").as_posix() for p in sorted((SITE / "_sources").rglob("*.ipynb"))]
    folders = (
        ("core/",) if not paper else ("sampling/", "search/", "speculative/", "diffusion/", "structured/", "memory/", "theory/", "vision/")
    )
    return [p for p in pages if p.startswith(folders)]


def main_pages() -> list[str]:
    """The pages that the browser opens: home, tables, one notebook of the core, one paper, one page with formulas, one API page."""
    papers = [p for p in notebook_pages(paper=True) if not p.endswith("/base.html")] or notebook_pages(paper=True)
    api = [p.relative_to(SITE).as_posix() for p in sorted((SITE / "api").glob("core.*.html"))]
    maths = [p for p in notebook_pages(paper=True) + notebook_pages(paper=False) if "math notranslate" in (SITE / p).read_text("utf-8")]
    chosen = [
        "index.html",
        *(f"{page}.html" for page in ("which", "verdicts", "differences")),
        "methods.html",
        "scoreboard.html",
        "zoo/index.html",
        *notebook_pages(paper=False)[:1],
        *papers[:1],
        *maths[:1],
        *api[:1],
    ]
    return list(dict.fromkeys(chosen))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not talk."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of a server of `_site` on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests; a wrong CHROMIUM is an error, no Chromium at all a skip."""
    from playwright.sync_api import sync_playwright

    path = find_browser() or pytest.skip("no Chromium on the PATH")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Watched:
    """A browser page that notes everything that goes wrong on it."""

    def __init__(self, browser: Any, address: str, **options: Any):
        self.address, self.faults = address, []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda m: m.type == "error" and self.faults.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda e: self.faults.append(f"script: {e}"))
        self.page.on("requestfailed", lambda r: self.faults.append(f"failed: {r.url}"))
        self.page.on("response", lambda r: r.status >= 400 and self.faults.append(f"{r.status}: {r.url}"))
        self.page.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.faults.append(f"other host: {request.url}")

    def open(self, path: str) -> Any:
        """Open a page of the site and wait until it is quiet."""
        self.page.goto(f"{self.address}/{path}", wait_until="networkidle")
        return self.page


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[Any]:
    """A maker of watched pages; what they noted fails the test at its end."""
    made: list[Watched] = []

    def make(**options: Any) -> Watched:
        made.append(Watched(browser, address, **options))
        return made[-1]

    yield make
    faults = [fault for each in made for fault in each.faults]
    for each in made:
        each.page.close()
    assert not faults


@pytest.mark.parametrize("path", main_pages() if (SITE / "index.html").exists() else [])
def test_page_loads_whole(watched, path):
    """Pictures have a size and formulas are drawn."""
    page = watched().open(path)
    page.evaluate("document.querySelectorAll('img').forEach((i) => { i.loading = 'eager'; })")
    page.wait_for_function("[...document.images].every((i) => i.complete)")
    assert page.evaluate("[...document.images].filter((i) => i.offsetParent && !i.naturalWidth).map((i) => i.src)") == []
    formulas = page.locator("article .math").count()
    if formulas:
        page.wait_for_selector("mjx-container svg", state="attached", timeout=20_000)
        assert page.locator("article mjx-container").count() >= formulas
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0


def test_some_page_has_formulas():
    """The page with formulas is among those that are opened, as soon as a notebook has one."""
    written = [p for p in (SITE / "_sources").rglob("*.ipynb") if '"$$' in p.read_text("utf-8")]
    if not written:
        pytest.skip("no notebook has a displayed formula yet")
    assert any("math notranslate" in (SITE / p).read_text("utf-8") for p in main_pages())


@pytest.mark.parametrize("path", main_pages() if (SITE / "index.html").exists() else [])
def test_phone_width(watched, path):
    """At 390 px nothing sticks out to the side."""
    page = watched(viewport={"width": 390, "height": 844}).open(path)
    if page.locator("article .math").count():
        page.wait_for_selector("mjx-container svg", state="attached", timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("window.innerWidth") + 1


def test_search_finds(watched):
    """A word of the core is found."""
    page = watched().open("search.html?q=decoder")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert page.locator("#search-results li").count() > 0


def test_dark_mode(watched):
    """The menu sets light and dark, and the page's colour follows."""
    page = watched(color_scheme="light").open("index.html")
    seen = {}
    for mode in ("light", "dark"):
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(f"button.theme-change-button[data-mode={mode}]:visible").first.click()
        theme = page.evaluate("document.documentElement.dataset.theme")
        seen[theme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert set(seen) == {"light", "dark"}
    assert seen["light"] != seen["dark"]


def test_method_filter(watched):
    """Typing in the field of the method table leaves the rows that match."""
    page = watched().open("methods.html")
    if page.locator(".dl-field").count() == 0:
        pytest.skip("too few methods for a filter yet")
    rows = page.locator(".dl-filter tbody tr")
    name = rows.first.locator("td").first.inner_text()
    page.fill(".dl-field", name)
    visible = [rows.nth(i).inner_text() for i in range(rows.count()) if rows.nth(i).is_visible()]
    assert 0 < len(visible) < rows.count()
    assert all(name.lower() in text.lower() for text in visible)


@pytest.mark.parametrize("right", [True, False])
def test_a_named_browser_is_used(right):
    """CHROMIUM alone decides: a browser that is not on the PATH opens the site, a wrong one fails the tests."""
    path = (find_browser() or pytest.skip("no Chromium on the PATH")) if right else str(SITE / "no-browser")
    env = {**os.environ, "CHROMIUM": path, "PATH": str(SITE)}
    command = [sys.executable, "-m", "pytest", __file__, "-m", "browser", "-k", "test_search_finds", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == (0 if right else 1), done.stdout
    assert ("1 passed" if right else "no-browser is no program: set it to the path of a Chromium") in done.stdout
    assert "skipped" not in done.stdout


class Links(HTMLParser):
    """Collects the links, the anchors and the pictures of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {"", "top"}
        self.pictures: list[tuple[str, str]] = []  # source and alternative text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag points to and what it can be pointed at by."""
        if tag == "img":
            known = dict(attrs)
            self.pictures.append((known.get("src") or "", known.get("alt") or ""))
        for key, value in attrs:
            if value and (key == "id" or (key == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and (key == "src" or (key == "href" and (tag, dict(attrs).get("rel")) != ("link", "canonical"))):
                self.links.add(value)


@functools.cache
def all_pages() -> dict[Path, Links]:
    """Every page of the site."""
    return {p.resolve(): Links(p.read_text("utf-8")) for p in SITE.rglob("*.html") if "_static" not in p.parts}


def test_pictures_say_what_they_show():
    """Every picture has an alternative text in words: no file name, no hash, none empty."""
    texts = [alt for found in all_pages().values() for _, alt in found.pictures]
    figures = [alt for found in all_pages().values() for source, alt in found.pictures if "_images/" in source]
    assert figures
    assert [alt for alt in texts if not alt.strip() or re.search(r"[0-9a-f]{16}|\.(?:png|svg|jpg)", alt)] == []


def test_local_links_lead_somewhere():
    """Every relative link, source and anchor of every page exists."""
    pages = all_pages()
    broken = []
    for path, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            lost = target in pages and unquote(parts.fragment) not in pages[target].anchors
            if not target.exists() or lost:
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert not broken


def test_colab_opens_notebooks_of_the_repository():
    """Every page of a notebook has a link to Colab, and each such link names a notebook that exists."""
    start = "https://colab.research.google.com/github/decodelab/decodelab/blob/main/"
    links = {path: {link for link in found.links if link.startswith("https://colab")} for path, found in all_pages().items()}
    root = SITE.parent
    assert [link for found in links.values() for link in found if not (root / link.removeprefix(start)).is_file()] == []
    notebooks = [p for p in (SITE / "_sources").rglob("*.ipynb") if p.name != "index.ipynb"]
    assert [p for p in notebooks if not links[SITE / p.relative_to(SITE / "_sources").with_suffix(".html")]] == []


def test_order_of_the_sidebar():
    """Methods come before the comparison, this before the foundations, the reference last."""
    text = (SITE / "index.html").read_text("utf-8")
    captions = re.findall(r'<span class="caption-text">(.*?)</span>', text)
    assert captions == ["Methods", "Compare", "Foundations", "Reference"]
    assert {"Foundations", "Compare", "Reference"} <= set(captions)


def test_downloads_are_whole_notebooks():
    """What a reader downloads is the notebook of the repository, hidden cells included."""
    nbs = SITE.parent / "nbs"
    copies = sorted((SITE / "_sources").rglob("*.ipynb"))
    assert copies
    assert all("cells" in c.read_text("utf-8") and (nbs / c.relative_to(SITE / "_sources")).exists() for c in copies)
    assert (SITE / "llms.txt").exists()
