"""A checkpoint of any known dialect becomes a model folder, ours or another's, tensor by tensor."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from retentive.convert.dialects import WRITTEN
from retentive.convert.plan import Plan, plan, rewrite
from retentive.convert.source import CONFIG, open_source
from retentive.convert.tokenizer import bring_tokenizer
from retentive.convert.writer import check_room, write_safetensors
from retentive.devices import resolve_dtype
from retentive.errors import InputError, nearest
from retentive.io.atomic import write_text
from retentive.io.folders import check_new, new_folder
from retentive.models.checkpoint import WEIGHTS

Stream = Iterator[tuple[str, Tensor]]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], object] = lambda line: None,
    watch: Callable[[Stream, Plan], Stream] = lambda stream, made: stream,
) -> Plan:
    """Write the checkpoint `source` (a folder, a file, a name on the Hub) as the new folder `out`.

    to      "fla" or "torchscale" for a folder of that dialect; ours without it
    dtype   of the weights; as they are stored without it
    say     is told which dialect it is and why, and what is to be known of the tokenizer
    watch   wraps the stream of tensors, to show how far it is

    Returns what was written. InputError, and nothing is left, where anything does not fit.
    """
    out = Path(out).expanduser()
    if to is not None and to not in WRITTEN:
        raise InputError(
            f"unknown target {to!r}{nearest(to, WRITTEN)}; choose {' or '.join(WRITTEN)},"
            " or leave it out for a folder of ours"
        )
    kind = None if dtype is None else resolve_dtype(dtype)
    check_new(out)
    made = plan(open_source(source))
    if kind is not None and made.config.quantization is not None:
        raise InputError(f"{source} has quantised weights, which stay as they are; no --dtype")
    say(made.told)
    if to is not None:
        made = rewrite(made, WRITTEN[to])
    tensors = made.tensors
    if kind is not None:
        tensors |= {name: tensors[name]._replace(dtype=kind) for name in made.pieces}
    check_room(out.parent, tensors)
    with new_folder(out) as folder:
        write_safetensors(folder / WEIGHTS, tensors, watch(made.stream(), made))
        write_text(folder / CONFIG, json.dumps(made.fields, indent=2) + "\n")
        for line in bring_tokenizer(made.source.folder, folder, made.config.vocab_size):
            say(line)
    return made
