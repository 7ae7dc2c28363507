"""A pruned model computes what the whole one computes with the rest masked, whatever its shape and whatever is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.compress.surgery import Kept, KeptLayer, pruned
from rankd.errors import ConfigError
from rankd.features.assembly import appended_tokens, history_arrays
from rankd.models.climber import Climber
from rankd.models.protocol import create_model
from tests.compress.made_models import (
    SCHEMAS,
    climber_options,
    kept_parts,
    logits,
    masked,
    sasrec_options,
    subject_of,
)
from tests.features.sample_schema import make_history, make_items


@settings(max_examples=40, deadline=None)
@given(climber_options(), st.data())
def test_a_pruned_climber_scores_as_the_masked_one(options: dict[str, object], data: st.DataObject) -> None:
    subject = subject_of("climber", options)
    kept = data.draw(kept_parts(subject))
    torch.testing.assert_close(logits(pruned(subject, kept)), logits(masked(subject, kept)), rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(sasrec_options(), st.data())
def test_a_pruned_sasrec_scores_as_the_masked_one(options: dict[str, object], data: st.DataObject) -> None:
    subject = subject_of("sasrec", options)
    kept = data.draw(kept_parts(subject))
    torch.testing.assert_close(logits(pruned(subject, kept)), logits(masked(subject, kept)), rtol=1e-3, atol=1e-4)


def test_pruning_changes_the_logits_and_the_options() -> None:
    """The comparison above could not fail if nothing were left out."""
    subject = subject_of("climber", {"width": 8, "heads": 2, "layers": 2, "ffn_ratio": 2, "hidden": 4})
    one, all_heads = np.asarray([1]), np.arange(2)
    blocks = ((KeptLayer(1, one, np.arange(16)),), (KeptLayer(0, all_heads, np.arange(3)), KeptLayer(1, one, one)))
    smaller = pruned(subject, Kept(np.arange(1, 8), blocks))
    assert not torch.allclose(logits(smaller), logits(subject), atol=1e-2)
    shape = smaller.choice.options["shape"]
    assert [[(layer["heads"], layer["ffn"]) for layer in stack] for stack in shape["blocks"]] == [
        [(1, 16)],
        [(2, 3), (1, 1)],
    ]
    assert smaller.choice.options["width"] == 7
    size = {name: sum(p.numel() for p in one.model.parameters()) for name, one in (("new", smaller), ("old", subject))}
    assert size["new"] < size["old"]


def test_keeping_everything_changes_nothing() -> None:
    subject = subject_of("climber", {"width": 8, "heads": 2, "layers": 2, "hidden": 4})
    everything = tuple(
        tuple(KeptLayer(n, np.arange(layer.heads), np.arange(layer.ffn)) for n, layer in enumerate(stack))
        for stack in subject.anatomy().blocks
    )
    again = pruned(subject, Kept(np.arange(8), everything))
    torch.testing.assert_close(logits(again), logits(subject), rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(climber_options(), st.integers(0, 5))
def test_the_state_of_unequal_layers_can_be_extended(options: dict[str, object], cut: int) -> None:
    model = subject_of("climber", options).model
    assert isinstance(model, Climber)
    whole = history_arrays(SCHEMAS["climber"], make_items(), make_history([5, 6, 7, 8, 9]))
    before = np.minimum(whole["history_length"], cut)
    counts = (whole["history_length"] - before)[0]
    tensors = {name: torch.from_numpy(array) for name, array in whole.items()}
    with torch.inference_mode():
        state = model.encode({**tensors, "history_length": torch.from_numpy(before)})
        new = appended_tokens(whole, tuple(before[0].tolist()), (max(int(counts.max()), 1),))
        added = model.extend(state, {name: torch.from_numpy(array) for name, array in new.items()})
        expected = model.encode(tensors)["keys_values"]
    assert expected.shape[2:4] == (model.shape.state_layers, 2)
    assert expected.shape[-1] == model.shape.state_width
    for block, count in enumerate(counts):
        start = int(before[0, block])
        torch.testing.assert_close(
            added["keys_values"][:, block, :, :, :count],
            expected[:, block, :, :, start : start + count],
            rtol=1e-3,
            atol=1e-4,
        )


GOOD = {"heads": 1, "head_width": 2, "ffn": 3}
FUSION = {"heads": 1, "head_width": 2, "gate": 3}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"blocks": [[GOOD]], "fusion": FUSION}, "layers for 1 blocks; the schema has 2"),
        ({"blocks": [[GOOD], []], "fusion": FUSION}, "every block needs a layer"),
        ({"blocks": [[GOOD], [{**GOOD, "ffn": 0}]], "fusion": FUSION}, r"blocks\[1\]\[0\].ffn is 0"),
        ({"blocks": [[GOOD], [{**GOOD, "up_rank": -1}]], "fusion": FUSION}, "up_rank is -1"),
        ({"blocks": [[GOOD], [{**GOOD, "neurons": 4}]], "fusion": FUSION}, "neurons"),
        ({"blocks": [[GOOD], [GOOD]], "fusion": {**FUSION, "gate": 0}}, "gate is 0"),
        ({"blocks": [[GOOD], [GOOD]], "fusion": FUSION, "repeats": 0}, "repeats has to be at least 1"),
    ],
)
def test_a_wrong_shape_is_refused_by_its_path(shape: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("climber", SCHEMAS["climber"], {"width": 4, "shape": shape})


@pytest.mark.parametrize(("shape", "message"), [([], "at least one layer"), ([{"heads": 1}], "head_width")])
def test_a_wrong_shape_of_a_sasrec_is_refused(shape: list[dict[str, int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("sasrec", SCHEMAS["sasrec"], {"width": 4, "shape": shape})
