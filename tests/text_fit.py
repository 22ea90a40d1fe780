"""Whether texts of a page are cut off or overlap for readers who space or enlarge them (WCAG 2.2, 1.4.4 and 1.4.12)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from tests.browser import FLAGS, chromium, watched_page

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser, Page

Reader = Literal["spacing", "twice"]
"""Somebody who adds the text spacing as a style sheet, or who has doubled the font size in the browser's settings."""

READERS: tuple[Reader, ...] = ("spacing", "twice")

SIZES: dict[Reader, tuple[tuple[int, int], ...]] = {
    "spacing": ((1280, 900), (640, 450), (320, 640)),
    "twice": ((1280, 900), (640, 900)),
}
"""Windows: on a desk, zoomed to 200 %, and the smallest that must not scroll to both sides (1.4.10)."""

SPACING = """* { line-height: 1.5 !important; letter-spacing: .12em !important; word-spacing: .16em !important; }
p { margin-bottom: 2em !important; }"""

_MISFITS = """() => {
  const root = document.documentElement;
  const found = [];
  const nameOf = (one) => one.tagName.toLowerCase() + (one.id && `#${one.id}`);
  const cuts = (one) => /hidden|clip/.test(getComputedStyle(one).overflow);
  const scrolls = (one) => /auto|scroll/.test(getComputedStyle(one).overflow);

  // All texts that can be seen, with their boxes on the screen.
  const texts = [];
  const top = document.querySelector('dialog[open]') ?? document.body;
  const walker = document.createTreeWalker(top, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const one = node.parentElement;
    const unseen = 'script, style, option, .hidden-text, #announcement'; // the last two are for screen readers
    if (!node.data.trim() || one.closest(unseen) || !one.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    texts.push({ one, boxes: [...range.getClientRects()], words: `${nameOf(one)} "${node.data.trim().slice(0, 40)}"` });
  }

  // The box of a text is as high as its font, which is more than its letters need.
  const inside = (box, { left, right, top, bottom }) => (
    box.left > left - 1.5 && box.right < right + 1.5 && box.top > top - 3 && box.bottom < bottom + 3);
  for (const { one, boxes, words } of texts) {
    for (let around = one; around !== root && !(scrolls(around) && around !== one); around = around.parentElement) {
      if (!cuts(around) && !around.matches('button, select')) continue;
      const edges = around.getBoundingClientRect();
      if (!boxes.every((box) => inside(box, edges))) found.push(`${words} ends outside ${nameOf(around)}`);
    }
  }
  // Texts of style sheets are not nodes.
  for (const one of top.querySelectorAll('button, h1, h2, td, th, dd, dt, p, label')) {
    const large = one.scrollWidth > one.clientWidth || one.scrollHeight > one.clientHeight + 3;
    if (large && cuts(one) && !one.matches('#announcement, .hidden-text')) found.push(`${nameOf(one)} is cut off`);
  }

  // What a part that scrolls does not show overlaps nothing.
  const shown = (one, box) => {
    for (let around = one; around !== root; around = around.parentElement) {
      const { top, bottom } = around.getBoundingClientRect();
      if (scrolls(around) && (box.bottom < top + 3 || box.top > bottom - 3)) return false;
    }
    return true;
  };
  const parts = texts.flatMap(({ one, boxes, words }) => (
    boxes.filter((box) => shown(one, box)).map((box) => ({ words, box }))));
  for (const [i, { words, box }] of parts.entries()) {
    for (const other of parts.slice(i + 1)) {
      const width = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
      const height = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
      if (words !== other.words && width > 2 && height > 4) found.push(`${words} overlaps ${other.words}`);
    }
  }
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...top.querySelectorAll('*')].filter((one) => one.getBoundingClientRect().right > innerWidth);
    found.push(`the page is ${root.scrollWidth} px wide: ${wide.map(nameOf).join(' ')}`);
  }
  return [...new Set(found)];
}"""


@contextmanager
def page_of(browser: Browser, reader: Reader) -> Iterator[Page]:
    """Yield a `watched_page` in the browser of this reader, for `misfits`."""
    # Style sheets can be added, which the content policy of our pages forbids.
    if reader == "spacing":
        with watched_page(browser, bypass_csp=True) as page:
            yield page
        return
    large = browser.browser_type.launch(
        executable_path=chromium(), args=[*FLAGS, "--blink-settings=defaultFontSize=32"]
    )
    with large, watched_page(large, bypass_csp=True) as page:
        yield page


def misfits(page: Page, reader: Reader) -> list[str]:
    """Return which texts are cut off or overlap, and whether the page is wider than its window, at all `SIZES`."""
    style = page.add_style_tag(content=SPACING if reader == "spacing" else "/* none */")
    found: list[str] = []
    if reader == "twice" and page.evaluate("() => parseFloat(getComputedStyle(document.body).fontSize)") < 28:
        found.append("the text does not follow the font size of the browser")
    for width, height in SIZES[reader]:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(250)  # the page adapts to its new size
        found += [f"{width}×{height}: {text}" for text in page.evaluate(_MISFITS)]
    style.evaluate("(one) => one.remove()")
    page.set_viewport_size({"width": 1280, "height": 900})
    return found
