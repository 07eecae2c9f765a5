"""Say what changed between two lists of pinned packages (a lock, the output of `pip freeze`).

python scripts/versions.py OLD NEW
"""

import re
import sys
from pathlib import Path

PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^\s;+]+)")  # a local version ("+cpu") is a build


def pins(path: Path) -> dict[str, str]:
    found = map(PIN.match, path.read_text().splitlines())
    return {re.sub(r"[-_.]+", "-", pin["name"]).lower(): pin["version"] for pin in found if pin}


def changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [
        f"{name} {old.get(name, '(none)')} -> {new.get(name, '(none)')}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


if __name__ == "__main__":
    old, new = (pins(Path(path)) for path in sys.argv[1:])
    print("\n".join(changes(old, new)) or "no version changed")
