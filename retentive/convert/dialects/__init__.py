"""The dialects that are known: a file each, and the order in which they are asked for.

To add one, write its file after the example of `fla`, and name its `Dialect` in `DIALECTS`, before
those whose keys it shares and that ask for less.
"""

import re
from difflib import SequenceMatcher

from retentive.convert.dialect import Dialect
from retentive.convert.dialects.fla import FLA, FLA_FUSED_FFN
from retentive.convert.dialects.syncdoth import SYNCDOTH
from retentive.convert.dialects.syncdoth_v1 import SYNCDOTH_V1
from retentive.convert.dialects.torchscale import TORCHSCALE
from retentive.convert.dialects.torchscale_2023 import TORCHSCALE_2023
from retentive.convert.dialects.xatl import XATL
from retentive.convert.dialects.yet_another import YET_ANOTHER
from retentive.convert.source import Source
from retentive.errors import InputError

DIALECTS = (
    FLA,
    FLA_FUSED_FFN,
    SYNCDOTH_V1,
    YET_ANOTHER,
    XATL,
    SYNCDOTH,
    TORCHSCALE_2023,
    TORCHSCALE,
)
WRITTEN = {dialect.name: dialect for dialect in (FLA, TORCHSCALE)}


def detect(source: Source) -> tuple[Dialect, str]:
    """The dialect, and the key that gives it away. InputError where none fits."""
    for dialect in DIALECTS:
        if found := dialect.evidence(source):
            return dialect, f"it holds {found}"
    seen = sorted({re.sub(r"\.\d+\.", ".0.", name) for name in source.tensors})
    nearest = max(DIALECTS, key=lambda dialect: _likeness(seen, dialect))
    raise InputError(
        f"{source.given} is of no dialect known here: it holds {', '.join(seen[:4])} and so on;"
        f" the nearest, {nearest.title}, holds"
        f" {', '.join(weight.theirs.format(0) for weight in nearest.weights[:4])}"
    )


def _likeness(seen: list[str], dialect: Dialect) -> float:
    """How much the keys are like those of the dialect, the nearest of each."""
    theirs = [weight.theirs.format(0) for weight in dialect.weights]
    some = seen[:: max(1, len(seen) // 20)]
    return sum(max(SequenceMatcher(None, a, b).ratio() for b in theirs) for a in some)
