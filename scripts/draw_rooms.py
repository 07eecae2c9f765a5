"""Draws docs/figures/rooms.png from the imports: a box a room, its area its lines; arrows go down.

    python scripts/draw_rooms.py

An import that another path of arrows implies is left out, as are errors, devices and the other
modules that everybody may import.
"""

import ast
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.patches import FancyBboxPatch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "retentive"
EVERYONES = {"errors", "devices", "fields", "sequences", "transforms", "arguments", "cli"}


def rooms() -> dict[str, set[str]]:
    """The rooms that each imports."""
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retentive."):
                found[room].add(node.module.split(".")[1])
    hidden = EVERYONES | {"__init__", "__main__"}
    return {room: needed - hidden - {room} for room, needed in found.items() if room not in hidden}


def ranks(needed: dict[str, set[str]]) -> dict[str, int]:
    """0 for a room that imports none, else one more than the highest below it."""
    rank: dict[str, int] = {}
    while len(rank) < len(needed):
        for room, below in needed.items():
            if room not in rank and below <= rank.keys():
                rank[room] = 1 + max((rank[other] for other in below), default=-1)
    return rank


def direct(needed: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports that no longer path implies."""

    def reach(room: str) -> set[str]:
        return needed[room].union(*(reach(other) for other in needed[room]))

    return [
        (room, below)
        for room, others in needed.items()
        for below in sorted(others)
        if not any(below in reach(other) for other in others - {below})
    ]


def lines(room: str) -> int:
    path = PACKAGE / room
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sum(len(file.read_text().splitlines()) for file in files)


def draw(out: Path) -> None:
    needed = rooms()
    needed |= {below: set() for below in set().union(*needed.values()) - needed.keys()}
    rank, places = ranks(needed), {}
    top = max(rank.values())
    for level in range(top + 1):
        names = sorted(room for room in needed if rank[room] == level)
        for index, room in enumerate(names):
            places[room] = ((index + 0.5) / len(names) * 10, level)
    figure, axes = plt.subplots(figsize=(9, 1.05 * (top + 1)), dpi=150)
    for room, below in direct(needed):
        (x, y), (u, v) = places[room], places[below]
        arrow = {"arrowstyle": "-|>", "color": "#8a8a8a", "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (u, v + 0.27), (x, y - 0.27), arrowprops=arrow, zorder=0)
    for room, (x, y) in places.items():
        box = FancyBboxPatch(
            (x - 0.62, y - 0.22), 1.24, 0.44, "round,pad=0.03", fc="#e8f0f8", ec="#0072b2", zorder=1
        )
        axes.add_patch(box)
        axes.text(x, y + 0.06, room, ha="center", va="center", fontsize=10, weight="bold")
        axes.text(x, y - 0.13, f"{lines(room):,} lines", ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, 10), ylim=(-0.5, top + 0.5))
    axes.axis("off")
    figure.savefig(out, bbox_inches="tight")


if __name__ == "__main__":
    draw(ROOT / "docs" / "figures" / "rooms.png")
