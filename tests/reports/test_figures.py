"""The style of figures: colours that everybody can tell apart, labels with room, whole files."""

from itertools import combinations, pairwise

import pytest
import torch

from retentive.reports import figures

# How colours look to people who lack one kind of cone, as matrices of linear RGB
# (Machado, Oliveira and Fernandes 2009, severity 1), and to all others.
SIGHTS = {
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    "usual": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}
TO_XYZ = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
WHITE = (0.9505, 1.0, 1.0888)


def linear(color: str) -> torch.Tensor:
    """RGB of sRGB's hexadecimal digits."""
    values = torch.tensor([int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: torch.Tensor) -> torch.Tensor:
    """CIELAB, where a distance of 2 or 3 can just be seen."""
    xyz = torch.tensor(TO_XYZ) @ rgb.clamp(0, 1) / torch.tensor(WHITE)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_are_told_apart_by_everybody(sight):
    seen = [lab(torch.tensor(SIGHTS[sight]) @ linear(color)) for color in figures.PALETTE]
    assert min(float((a - b).norm()) for a, b in combinations(seen, 2)) > 20


def test_colours_stand_out_from_white():
    """A contrast of 3, as WCAG 2 wants for graphics."""
    for color in (*figures.PALETTE, figures.GUIDE):
        luminance = float(torch.tensor(TO_XYZ[1]) @ linear(color))
        assert 1.05 / (luminance + 0.05) > 3, color


def test_a_figure_is_a_png_and_an_svg_the_same_each_time(tmp_path):
    for name in ("once", "again"):
        with figures.figure(tmp_path / f"{name}-6.7b", "Title") as drawn:
            drawn.subplots().plot([1, 2], [3, 4], label="line")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("again-6.7b.png", "again-6.7b.svg", "once-6.7b.png", "once-6.7b.svg")
    ]
    for kind in ("png", "svg"):
        once, again = (tmp_path / f"{name}-6.7b.{kind}" for name in ("once", "again"))
        assert once.read_bytes() == again.read_bytes()


def test_a_figure_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(ZeroDivisionError), figures.figure(tmp_path / "a", kinds=("png",)):
        _ = 1 / 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_style_does_not_depend_on_the_users_own(tmp_path):
    import matplotlib

    with figures.figure(tmp_path / "plain", kinds=("png",)) as drawn:
        drawn.subplots().plot([1, 2], [3, 4])
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        with figures.figure(tmp_path / "other", kinds=("png",)) as drawn:
            drawn.subplots().plot([1, 2], [3, 4])
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_labels_at_the_ends_of_lines_keep_their_order_and_a_distance(tmp_path):
    with figures.figure(tmp_path / "ends", kinds=("png",)) as drawn:
        axes = drawn.subplots()
        for number, end in enumerate((5.0, 5.01, 5.02, 1.0)):
            axes.plot([0, 1], [0, end], label=f"line {number}")
        figures.label_ends(axes)
        heights = [text.get_window_extent().y0 for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [f"line {n}" for n in range(4)]
    first, second, third, lowest = heights
    assert lowest < first < second < third
    gap = figures.STYLE["font.size"] * figures.DPI / 72
    assert all(high - low > gap for low, high in pairwise((first, second, third)))


def test_counts_of_tokens_are_short():
    assert [figures.count(n) for n in (1, 100, 1024, 2048, 131072, 1000, 0)] == [
        *("1", "100", "1k", "2k", "128k", "1,000", "0")
    ]
