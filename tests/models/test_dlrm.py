"""DLRM's dense part against the formulas written out, its sizes as MLPerf's, and its ranker's features one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankd.errors import ConfigError
from rankd.features.assembly import candidate_arrays, history_arrays
from rankd.models.dlrm import Dlrm, DlrmNet
from rankd.models.protocol import create_model, is_extendable
from tests.features.sample_schema import DAY, make_history, make_items, make_schema, make_user

MLPERF_TABLES = 26
SCHEMA, ITEMS, USER, NOW = make_schema(), make_items(), make_user(), 100 * DAY


def randomize(model: nn.Module) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.eval()


def relu_layers(x: Tensor, layers: nn.Module) -> Tensor:
    for layer in layers.children():
        if isinstance(layer, nn.Linear):
            x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    return x


def top(net: DlrmNet, x: Tensor) -> Tensor:
    *hidden, last = [layer for layer in net.top.children() if isinstance(layer, nn.Linear)]
    for layer in hidden:
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    return x @ last.weight.T + last.bias


def test_the_cross_form_is_its_formula() -> None:
    net = DlrmNet(5, 3, dim=4, tasks=2, bottom=(6,), top=(7, 5), cross_layers=2, cross_rank=3)
    randomize(net)
    numbers, pooled = torch.randn(2, 8, 5), torch.randn(2, 8, 3, 4)
    first = torch.cat([relu_layers(numbers, net.bottom), pooled.flatten(-2)], -1)
    weights = dict(net.interaction.named_parameters())
    x = first
    for layer in range(2):
        down, up, bias = (weights[f"1.{n}"] for n in (f"down.{layer}.weight", f"up.{layer}.weight", f"up.{layer}.bias"))
        x = first * ((x @ down.T) @ up.T + bias) + x
    torch.testing.assert_close(net(numbers, pooled), top(net, x))


def test_the_dot_form_is_its_formula() -> None:
    net = DlrmNet(5, 3, dim=4, interaction="dot", bottom=(6,), top=(7,))
    randomize(net)
    numbers, pooled = torch.randn(8, 5), torch.randn(8, 3, 4)
    dense = relu_layers(numbers, net.bottom)
    vectors = [dense, *pooled.unbind(-2)]
    products = [(vectors[i] * vectors[j]).sum(-1, keepdim=True) for i in range(4) for j in range(i)]
    torch.testing.assert_close(net(numbers, pooled), top(net, torch.cat([dense, *products], -1)))


def test_the_sizes_are_those_of_mlperf() -> None:
    """13 numbers, 26 tables of width 128, DCNv2 of 3 layers and rank 512: the weights beside the tables."""
    with torch.device("meta"):
        net = DlrmNet(13, MLPERF_TABLES)
    width = (MLPERF_TABLES + 1) * 128
    bottom = 13 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128
    cross = 3 * (width * 512 + 512 * width + width)
    over = width * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256 + 256 + 1
    assert sum(parameter.numel() for parameter in net.parameters()) == bottom + cross + over


@pytest.mark.parametrize("interaction", ["cross", "dot"])
def test_every_feature_counts(interaction: str) -> None:
    model = Dlrm(SCHEMA, interaction=interaction)
    randomize(model)
    history = make_history([5, 6, 7])
    packed = {k: torch.from_numpy(v) for k, v in history_arrays(SCHEMA, ITEMS, history).items()}
    rows = np.asarray([3, 4], np.int32)
    given = candidate_arrays(SCHEMA, ITEMS, history, rows, USER, NOW)
    candidates = {name: torch.from_numpy(array) for name, array in given.items()}
    model.score(model.encode(packed), candidates).sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in silent if name.startswith("tokens.") or "interaction" in name} == set()


def test_without_a_table_of_items_columns_and_numbers_count_alone() -> None:
    model = Dlrm(SCHEMA, item_table=False)
    randomize(model)
    assert set(model.tables()) == {name for name in Dlrm(SCHEMA).tables() if name != "item"}
    rows, seen = np.asarray([3, 4], np.int32), []
    for items in ([5, 6, 7], [8]):
        history = make_history(items)
        packed = {k: torch.from_numpy(v) for k, v in history_arrays(SCHEMA, ITEMS, history).items()}
        given = candidate_arrays(SCHEMA, ITEMS, make_history([]), rows, USER, NOW)
        candidates = {name: torch.from_numpy(array) for name, array in given.items()}
        seen.append(model.score(model.encode(packed), candidates))
    torch.testing.assert_close(seen[0], seen[1])
    candidates["candidate_categories"] = torch.zeros_like(candidates["candidate_categories"])
    assert not torch.allclose(model.score(model.encode(packed), candidates), seen[1])


def test_a_sum_of_nothing_is_nothing() -> None:
    model = Dlrm(SCHEMA)
    randomize(model)  # row 0 too: it is no item, whatever stands there
    empty = {k: torch.from_numpy(v) for k, v in history_arrays(SCHEMA, ITEMS, make_history([])).items()}
    assert not model.encode(empty)["pooled"].any()


def test_new_events_are_added_to_the_state() -> None:
    model = Dlrm(SCHEMA)
    randomize(model)
    assert is_extendable(model)
    blocks = SCHEMA.num_sub_sequences
    rows = torch.tensor([[[3, 4, 5, 6]] * blocks], dtype=torch.int32)

    def tokens(part: slice, length: int) -> dict[str, Tensor]:
        return {"history_item": rows[..., part], "history_length": torch.full((1, blocks), length)}

    whole, begun = model.encode(tokens(slice(4), 4)), model.encode(tokens(slice(4), 3))
    torch.testing.assert_close(model.extend(begun, tokens(slice(3, 4), 1))["pooled"], whole["pooled"])


def test_an_unknown_interaction_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cross' or 'dot', not 'sum'"):
        create_model("dlrm", SCHEMA, {"interaction": "sum"})
