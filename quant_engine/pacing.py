"""Layers of a prompt that MLX works on: few at a time, since it holds the activations of all that are under way."""

import threading
from collections import deque

import mlx.core as mx

LONG, AHEAD = 512, 2
"""Tokens of a long step, and how many of its layers may be under way beside the newest."""


class Layers(threading.local):
    """One code of what each of a thread's last layers gave to its cache, made with it: held whole, these would stay.

    MLX's streams are a thread's own too.
    """

    def __init__(self) -> None:
        self.made = deque[mx.array]()

    def add(self, codes: mx.array) -> None:
        """Have a layer's codes (B, KV heads, L, words) computed, and wait for those that came AHEAD of them."""
        if codes.shape[2] < LONG:
            return
        last = codes[0, 0, -1, :1] + 0
        mx.async_eval(last)
        self.made.append(last)
        if len(self.made) > 2 * AHEAD:
            mx.eval(self.made.popleft())


under_way = Layers()
