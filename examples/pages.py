"""Fetch the pages of a site, embed them in batches, and find the ones that are alike.

    dagorama serve                              # in one terminal
    dagorama worker pages --tolerate gpu         # in another, in this directory
    python pages.py                              # in a third
"""

from hashlib import sha256
from math import sqrt
from urllib.request import urlopen

from dagorama import action, batch_action


@action
def fetch(url: str) -> str:
    with urlopen(url, timeout=30) as response:
        return str(response.read(), "utf-8", "replace")


@batch_action(max_size=64, max_wait=0.02, taint="gpu")  # calls of many runs are bundled for one GPU pass …
def embed(pages: list[str]) -> list[list[float]]:  # … and typed as str -> list[float] where they are made
    vectors = []
    for page in pages:
        vector = [0.0] * 64
        for word in page.lower().split():
            vector[sha256(word.encode()).digest()[0] % 64] += 1.0
        length = sqrt(sum(x * x for x in vector)) or 1.0
        vectors.append([x / length for x in vector])
    return vectors


@action
def similar(vectors: list[list[float]]) -> list[tuple[int, int, float]]:
    pairs = []
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors[:i]):
            pairs.append((j, i, round(sum(x * y for x, y in zip(a, b, strict=True)), 6)))
    return sorted(pairs, key=lambda pair: -pair[2])


@action
def site(urls: list[str]) -> list[tuple[int, int, float]]:
    return similar([embed(fetch(u)) for u in urls])  # promises; nothing has run yet


if __name__ == "__main__":
    import sys

    urls = sys.argv[1:] or ["https://www.python.org/", "https://docs.python.org/3/"]
    print(site.submit(urls).result())
