"""Tables and sizes as people read them."""

import pytest

from retentive.reports.tables import console, new_table, size


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        *((0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**40, "1 TiB")),
        (1010 * 2**20, "0.986 GiB"),  # not 1.01e+03 MiB
    ],
)
def test_sizes_in_bytes(count, shown):
    assert size(count) == shown


def test_numbers_are_right_and_words_left(capsys):
    table = new_table("title", ["name", "n"], words=["name"])
    table.add_row("a", "1")
    table.add_row("longer", "1,000")
    console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "title"
    assert "│ a      │     1 │" in lines
