"""States as values: rows picked, put together, copied, saved; none of it shows in another."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from retentive.errors import InputError
from retentive.models.checkpoint import fingerprint, load_state
from retentive.models.state import RetNetState, concat

EXACT = {"rtol": 0.0, "atol": 1e-11}


@pytest.fixture
def ragged(model, tokens: Tensor) -> RetNetState:
    """Rows that have read 4, 2 and 5 tokens."""
    with torch.no_grad():
        mask = torch.arange(5) < torch.tensor([[4], [2], [5]])
        return model(tokens[:, :5], padding_mask=mask)[1]


@torch.no_grad()
def test_select_reorders_and_repeats(model, tokens: Tensor, ragged: RetNetState) -> None:
    rows = [2, 0, 2]
    picked = ragged.select(rows)
    assert picked.batch_size == 3
    assert picked.positions.tolist() == [5, 4, 5]
    logits, _ = model(tokens[:, 5:], ragged)
    again, _ = model(tokens[rows][:, 5:], picked)
    torch.testing.assert_close(again, logits[rows], **EXACT)
    assert ragged.select([]).batch_size == 0
    assert torch.equal(ragged.select(torch.tensor([1])).positions, torch.tensor([2]))


@torch.no_grad()
def test_concat_undoes_select(model, tokens: Tensor, ragged: RetNetState) -> None:
    together = concat([ragged.select([0, 1]), ragged.select([2]), model.init_state(1)])
    assert together.positions.tolist() == [4, 2, 5, 0]
    wanted, _ = model(tokens[:, 5:], ragged)
    given, _ = model(torch.cat((tokens, tokens[:1]))[:, 5:], together)
    torch.testing.assert_close(given[:3], wanted, **EXACT)
    torch.testing.assert_close(given[3:], model(tokens[:1, 5:])[0], **EXACT)


@torch.no_grad()
def test_restarted_rows_have_the_initial_state(model, tokens: Tensor, ragged: RetNetState) -> None:
    fresh = model.restart_rows(ragged, torch.tensor([False, True, False]))
    assert fresh.positions.tolist() == [4, 0, 5]
    wanted, _ = model(tokens[:, 5:], ragged)
    given, _ = model(tokens[:, 5:], fresh)
    torch.testing.assert_close(given[[0, 2]], wanted[[0, 2]], **EXACT)
    torch.testing.assert_close(given[1:2], model(tokens[1:2, 5:])[0], **EXACT)
    assert ragged.positions.tolist() == [4, 2, 5]


@torch.no_grad()
def test_a_clone_may_be_updated_in_place(model, tokens: Tensor, ragged: RetNetState) -> None:
    """A cache, which never is, stays shared: what is appended to one is not in the other."""
    wanted, _ = model(tokens[:, 5:], ragged)
    clone = ragged.clone()
    model(tokens[:, :3], clone)
    clone.positions.fill_(99)
    for block, layer in zip(model.blocks, clone.layers, strict=True):
        for tensor in layer.tensors().values() if block.mixer.rewrites_state else ():
            tensor.fill_(99)
    torch.testing.assert_close(model(tokens[:, 5:], ragged)[0], wanted, **EXACT)


def test_sizes(model, ragged: RetNetState) -> None:
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for layer in ragged.layers
        for x in layer.tensors().values()
    }
    assert ragged.nbytes == sum(held.values())
    assert ragged.batch_size == 3
    assert ragged.to("cpu").positions.device.type == "cpu"
    assert model.init_state(2, capacity=7).nbytes > 0


@torch.no_grad()
def test_saved_and_loaded(model, tokens: Tensor, ragged: RetNetState, tmp_path) -> None:
    path = tmp_path / "state.safetensors"
    extra, tensors = {"stop": ["é"], "last": 3}, {"seen": torch.arange(4)}
    ragged.save(path, fingerprint=fingerprint(model), extra=extra, tensors=tensors)
    loaded, given_extra, given_tensors = load_state(path, model)
    assert given_extra == extra
    assert torch.equal(given_tensors["seen"], tensors["seen"])
    wanted, _ = model(tokens[:, 5:], ragged)
    assert torch.equal(model(tokens[:, 5:], loaded)[0], wanted)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["extra"]) == extra


def test_refuses_the_state_of_other_weights(model, make_model, tmp_path) -> None:
    path = tmp_path / "state"
    model.init_state(1).save(path, fingerprint=fingerprint(model))
    assert load_state(path, model)[1:] == ({}, {})
    with torch.no_grad():
        model.layers[1].ffn.down_proj.weight.mul_(1.001)
    with pytest.raises(InputError, match="other weights"):
        load_state(path, model)
    for other in (make_model("retnet", num_heads=2), make_model("transformer", num_kv_heads=1)):
        with pytest.raises(InputError, match="another model"):
            load_state(path, other)


def test_refuses_the_state_of_another_dtype(model, tmp_path) -> None:
    path = tmp_path / "state"
    model.init_state(1).save(path, fingerprint=fingerprint(model))
    for dtype in ("float32", "bfloat16"):
        model.to(getattr(torch, dtype))
        with pytest.raises(InputError, match=f"in float64, this one is in {dtype}; .*float64$"):
            load_state(path, model)


def test_refuses_broken_files(model, tmp_path) -> None:
    path = tmp_path / "state"
    with pytest.raises(InputError, match="does not exist"):
        load_state(path, model)
    model.init_state(1).save(path, fingerprint=fingerprint(model))
    whole = path.read_bytes()
    for kept in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError, match=r"truncated|no saved state") as caught:
            load_state(path, model)
        assert "\n" not in str(caught.value)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no saved state"):
        load_state(path, model)
