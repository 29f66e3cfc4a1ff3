"""The independent witness of `dagorama demo`: was everything done, and each outcome applied once?

A process of its own that never talks to the broker. It reads what the workers wrote down themselves (one line when an
attempt starts, one when its outcome was sent, one when the broker had acknowledged it) and the file in which the ranking
arrived, and works the whole ranking out again in plain Python, without a graph.

usage: verdict.py JOURNAL_DIR OUTPUT_FILE INPUT_FILE [KILLED_PID...]
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from crawl import site


def verdict(journals: list[dict[str, Any]], outputs: list[Any], inputs: list[Any], killed: set[int]) -> dict[str, Any]:
    """Count what was lost or applied twice, and compare what came out with what should have."""
    accepted: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    started: dict[tuple[str, str], set[int]] = defaultdict(set)
    actions: dict[tuple[str, str], str] = {}
    sent: set[tuple[str, str]] = set()
    for line in journals:
        node = (line["run"], line["node"])
        if line["what"] == "started":
            started[node].add(line["attempt"])
            actions[node] = line["action"]
        elif line["what"] == "sent" and line["end"] <= 2 and line["pid"] in killed:
            sent.add(node)
        elif line["what"] == "accepted" and line["end"] <= 2:  # a value, a structure or a tail call
            accepted[node][line["attempt"]] += 1
    # Applied twice: outcomes of two different attempts of one node were both acknowledged.
    twice = sum(1 for attempts in accepted.values() if len(attempts) > 1)
    # Unheard: sent by a process that was killed before it heard the answer, and never given out again. The broker must have taken it,
    # since the ranking needs every node: if it had not, the node would have run again, or the output would be wrong or missing.
    unheard = {node for node in sent if node not in accepted}
    # Lost: an outcome was acknowledged, and the node was given out again afterwards; or none was ever sent.
    again = sum(1 for node, attempts in accepted.items() if any(n > min(attempts) for n in started[node]) and len(attempts) == 1)
    unfinished = sum(1 for node in started if node not in accepted and node not in unheard)
    expected: Counter[str] = Counter()
    for urls in inputs:
        n = len(urls)
        expected.update({"crawl.site": 1, "crawl.fetch": n, "crawl.extract": n, "crawl.compare": n * (n - 1) // 2, "crawl.rank": 1})
    found = Counter(actions[node] for node in accepted) + Counter(actions[node] for node in unheard)
    missing = sum((expected - found).values())
    invented = sum((found - expected).values())
    wanted = [site.local(urls) for urls in inputs]
    normal = [json.dumps(value, sort_keys=True) for value in outputs]
    return {
        "nodes": len(accepted) + len(unheard),
        "unheard": len(unheard),
        "lost": again + max(unfinished, missing),
        "applied_twice": twice + invented,
        "attempts": sum(len(attempts) for attempts in started.values()),
        "output_lines": len(outputs),
        "output_equal": sorted(normal) == sorted(json.dumps(value, sort_keys=True) for value in wanted),
    }


def main() -> int:
    """Read the files, print one JSON line."""
    journal_dir, output_file, input_file = map(Path, sys.argv[1:4])
    files = sorted(journal_dir.iterdir())
    journals = [{**json.loads(line), "pid": int(path.stem)} for path in files for line in path.read_text().splitlines()]
    outputs = [json.loads(line) for line in output_file.read_text().splitlines()] if output_file.exists() else []
    inputs = [json.loads(line) for line in input_file.read_text().splitlines()]
    result = verdict(journals, outputs, inputs, set(map(int, sys.argv[4:])))
    print(json.dumps(result))
    return 0 if result["lost"] == result["applied_twice"] == 0 and result["output_equal"] and result["nodes"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
