"""The built site in a browser: no errors, no request to another host, pictures, formulas, search, dark mode, phone width, links."""

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.browser

SITE = Path(__file__).resolve().parents[1] / "_site"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_site = pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no _site: run `make docs` first")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")


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
    """One headless Chromium for all tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
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


@needs_site
@needs_browser
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


@needs_site
@needs_browser
def test_some_page_has_formulas():
    """The page with formulas is among those that are opened, as soon as a notebook has one."""
    written = [p for p in (SITE / "_sources").rglob("*.ipynb") if '"$$' in p.read_text("utf-8")]
    if not written:
        pytest.skip("no notebook has a displayed formula yet")
    assert any("math notranslate" in (SITE / p).read_text("utf-8") for p in main_pages())


@needs_site
@needs_browser
@pytest.mark.parametrize("path", main_pages() if (SITE / "index.html").exists() else [])
def test_phone_width(watched, path):
    """At 390 px nothing sticks out to the side."""
    page = watched(viewport={"width": 390, "height": 844}).open(path)
    if page.locator("article .math").count():
        page.wait_for_selector("mjx-container svg", state="attached", timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("window.innerWidth") + 1


@needs_site
@needs_browser
def test_search_finds(watched):
    """A word of the core is found."""
    page = watched().open("search.html?q=decoder")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert page.locator("#search-results li").count() > 0


@needs_site
@needs_browser
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


@needs_site
@needs_browser
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


class Links(HTMLParser):
    """Collects the links and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag points to and what it can be pointed at by."""
        for key, value in attrs:
            if value and (key == "id" or (key == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and (key == "src" or (key == "href" and (tag, dict(attrs).get("rel")) != ("link", "canonical"))):
                self.links.add(value)


@needs_site
def test_local_links_lead_somewhere():
    """Every relative link, source and anchor of every page exists."""
    pages = {p.resolve(): Links(p.read_text("utf-8")) for p in SITE.rglob("*.html") if "_static" not in p.parts}
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


@needs_site
def test_order_of_the_sidebar():
    """Papers come before the foundations, these before the comparison, the reference last."""
    text = (SITE / "index.html").read_text("utf-8")
    captions = re.findall(r'<span class="caption-text">(.*?)</span>', text)
    order = ["Start", "Papers", "Foundations", "Compare", "Reference"]
    assert captions == [c for c in order if c in captions]
    assert {"Foundations", "Compare", "Reference"} <= set(captions)


@needs_site
def test_downloads_are_whole_notebooks():
    """What a reader downloads is the notebook of the repository, hidden cells included."""
    nbs = SITE.parent / "nbs"
    copies = sorted((SITE / "_sources").rglob("*.ipynb"))
    assert copies
    assert all("cells" in c.read_text("utf-8") and (nbs / c.relative_to(SITE / "_sources")).exists() for c in copies)
    assert (SITE / "llms.txt").exists()
