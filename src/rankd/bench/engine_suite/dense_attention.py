"""Attention under one dense mask, as somebody would call it: written out, or by one of torch's fused kernels.

In: the tokens of a block. Out: what each of its layers makes of them. `dense_model.py` is built of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rankd.errors import EngineFailure
from rankd.models.blocks import BlockLayer, pairs, time_bucket
from rankd.models.climber import Layer


class Attention(Enum):
    """PLAIN: products, softmax or what the layer has in its place, as the model itself does it. SDPA:
    scaled_dot_product_attention with the biases as its mask, in memory. FLEX: FlexAttention, which works biases out in
    its kernel and leaves out blocks of keys that nobody sees; to be compiled."""

    PLAIN = "plain"
    SDPA = "sdpa"
    FLEX = "flex"


@dataclass(frozen=True, slots=True)
class DenseTokens:
    """S = T + C tokens of one block: their place in the history and their moment (B, S); length (B,) of the history.

    Candidates stand right after the history, all at the same place. `tokens` is T; so many `positions` are told apart.
    """

    place: Tensor
    moment: Tensor
    length: Tensor
    tokens: int
    positions: int

    @classmethod
    def of(cls, times: Tensor, now: Tensor, length: Tensor, positions: int) -> DenseTokens:
        """Of times (B, T) and now (B, C)."""
        tokens, count = times.shape[1], now.shape[1]
        index = torch.arange(tokens, device=times.device).expand_as(times)
        place = torch.cat([index, length[:, None].expand(-1, count)], 1)
        return cls(place, torch.cat([times, now], 1), length, tokens, positions)

    def pairs(self) -> Tensor:
        """The number (B, S, S) of each pair of tokens in the table of biases, masked pairs included."""
        place, moment = self.place, self.moment
        number = torch.arange(place.shape[1], device=place.device)
        real = (number < self.tokens) & (number < self.length[:, None])  # (B, S): a key that is an event
        earlier = real[:, None] & (place[:, None, :] < place[:, :, None])
        allowed = earlier | (number[:, None] == number)
        distance = torch.where(allowed, place[:, :, None] - place[:, None], -1)
        return pairs(distance, moment[:, :, None] - moment[:, None], self.positions)


Attend = Callable[[BlockLayer, Tensor], Tensor]
"""A layer and tokens (B, S, D) to the next tokens."""


def attention_over(tokens: DenseTokens, attention: Attention) -> Attend:
    """What every layer of a block does with its tokens."""
    if attention is Attention.FLEX:
        return _flex(tokens)
    pair = tokens.pairs()

    def plain(layer: BlockLayer, x: Tensor) -> Tensor:
        normed = layer.normed(x)
        return layer.attend(x, normed, *layer.keys_values(normed), layer.bias(pair))

    def fused(layer: BlockLayer, x: Tensor) -> Tensor:
        softmax = _of_softmax(layer)
        queries, keys, values = _parts(softmax, x)
        bias = layer.bias(pair).to(queries.dtype)
        return softmax.finish(x, scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0))

    return plain if attention is Attention.PLAIN else fused


def _flex(tokens: DenseTokens) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    place, moment, length = tokens.place, tokens.moment, tokens.length

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        earlier = (key < tokens.tokens) & (key < length[b]) & (place[b, key] < place[b, query])
        return earlier | (query == key)

    size = place.shape[1]
    mask = create_block_mask(seen, place.shape[0], None, size, size, device=place.device)

    def attend(layer: BlockLayer, x: Tensor) -> Tensor:
        softmax = _of_softmax(layer)
        queries, keys, values = _parts(softmax, x)
        positions, times = softmax.bias.position, softmax.bias.time

        def biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = (place[b, query] - place[b, key]).clamp(0, tokens.positions)
            seconds = moment[b, query] - moment[b, key]
            return score + positions[distance, h] + times[time_bucket(seconds), h]

        attended: Tensor = flex_attention(queries, keys, values, score_mod=biased, block_mask=mask, scale=1.0)
        return softmax.finish(x, attended)

    return attend


def _of_softmax(layer: BlockLayer) -> Layer:
    if not isinstance(layer, Layer):
        raise EngineFailure(f"the attention of {type(layer).__name__} is no softmax: torch has no fused kernel for it")
    return layer


def _parts(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, S, A / H), all of one type."""
    normed = layer.normed(x)
    keys, values = (layer.split(part) for part in layer.keys_values(normed))
    return layer.queries(normed).to(keys.dtype), keys, values
