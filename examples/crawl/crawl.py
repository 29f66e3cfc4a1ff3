"""Crawl a group of pages, then compare them all.

The program of `dagorama demo`, and the tutorial's. Every function is ordinary Python: call `site([...])` in a test and it runs
right here. Run by a worker, each call becomes a node of one graph that the broker keeps:

    fetch -> extract, once per page        the pages of a crawl
    compare, once per pair of pages        needs two extracts each: the join that queues cannot do
    rank                                   needs every comparison and every extract
"""

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from math import sqrt
from typing import NamedTuple, TypedDict
from urllib.parse import urldefrag, urljoin
from urllib.request import urlopen

from dagorama import Retry, action

COMMON = frozenset({"and", "are", "can", "for", "from", "its", "not", "that", "the", "this", "with", "you", "your", "will"})


class Page(NamedTuple):
    """What a page links to and what it is about."""

    url: str
    links: list[str]
    words: dict[str, int]


class Pair(NamedTuple):
    """How alike two pages are, from 0 to 1."""

    left: str
    right: str
    likeness: float


class Ranking(TypedDict):
    """The answer: JSON, so that it can leave through any bridge."""

    pages: int
    pairs: int
    most_alike: list[list[object]]
    most_linked: list[list[object]]


class _Text(HTMLParser):
    """Collects the visible words and the links of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []
        self.text: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self.hidden += 1
        if tag == "a" and (target := dict(attrs).get("href")):
            self.links.append(target)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.append(data)


@action(retry=Retry(attempts=5, delay=0.2))
def fetch(url: str) -> str:
    """The page behind a URL; tried again when the network has a bad moment."""
    with urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body.decode("utf-8", "replace")


@action
def extract(url: str, html: str) -> Page:
    """Links, and how often each word comes up."""
    parser = _Text()
    parser.feed(html)
    words = re.findall(r"[a-z]{3,}", " ".join(parser.text).lower())
    counts = Counter(word for word in words if word not in COMMON)
    links = sorted({urldefrag(urljoin(url, link)).url for link in parser.links})
    return Page(url, links, dict(counts))


@action
def compare(left: Page, right: Page) -> Pair:
    """Cosine of the two pages' word counts."""
    dot = sum(n * right.words.get(word, 0) for word, n in left.words.items())
    size = sqrt(sum(n * n for n in left.words.values())) * sqrt(sum(n * n for n in right.words.values()))
    return Pair(left.url, right.url, round(dot / size, 6) if size else 0.0)


@action
def rank(pages: list[Page], pairs: list[Pair]) -> Ranking:
    """The pairs most alike, and the pages most linked to by the others."""
    known = {page.url for page in pages}
    linked = Counter(link for page in pages for link in page.links if link in known and link != page.url)
    alike = sorted(pairs, key=lambda pair: (-pair.likeness, pair.left, pair.right))[:10]
    return {
        "pages": len(pages),
        "pairs": len(pairs),
        "most_alike": [[pair.left, pair.right, pair.likeness] for pair in alike],
        "most_linked": [[url, n] for url, n in sorted(linked.items(), key=lambda item: (-item[1], item[0]))[:10]],
    }


@action
def site(urls: list[str]) -> Ranking:
    """The whole job. The calls below are promises: nothing has run when this function returns."""
    pages = [extract(url, fetch(url)) for url in urls]
    return rank(pages, [compare(left, right) for left, right in combinations(pages, 2)])
