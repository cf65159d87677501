"""What predictions make of the weights alone, made once: rounded copies, layouts, the matrices of convolutions.

A recorded prediction would make them whenever it is replayed, by a fifth of its two hundred kernels. Operators ask
for them by :func:`of_weights`; inside of :class:`MadeOfWeights` they are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


class _Here(threading.local):
    """Who is asked in a thread, as others may predict meanwhile."""

    ask: Callable | None = None


_here = _Here()


def of_weights(function: Callable[..., Result], *inputs: Any) -> Result:
    """``function(*inputs)``: tensors that depend on weights and settings alone.

    Args:
        function: the same object in every forward pass; it gives a tensor, or several, and changes none.
        inputs: weights, views of them, or what this gave before; settings.
    """
    if torch.compiler.is_compiling() or _here.ask is None:
        return function(*inputs)
    return _here.ask(function, *inputs)


class MadeOfWeights:
    """What a forward pass asks of :func:`of_weights`, in the order in which it asks.

    Args:
        weights: that it may be made of; they stay where they are in memory.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self._made: list[tuple[Callable, tuple, Any]] = []
        self._places = {weight.untyped_storage().data_ptr() for weight in weights}

    @contextmanager
    def making(self) -> Iterator[None]:
        """Inside, a forward pass makes it.

        Raises:
            RuntimeError: something is made of a tensor that is none of the weights, so it would not be renewed.
        """
        with self._asked(self._make):
            yield

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the same forward pass finds it.

        Raises:
            RuntimeError: it asks for something else.
        """
        with self._asked(partial(self._next, iter(self._made))):
            yield

    def renew(self) -> None:
        """Makes it again, in the same memory, for weights that changed."""
        with torch.inference_mode(False), torch.no_grad():
            for function, inputs, result in self._made:
                for memory, new in zip(tree_leaves(result), tree_leaves(function(*inputs)), strict=True):
                    if memory.data_ptr() != new.data_ptr():  # a view of the weights has nothing to be renewed
                        memory.copy_(new)

    @contextmanager
    def _asked(self, ask: Callable) -> Iterator[None]:
        before, _here.ask = _here.ask, ask
        try:
            yield
        finally:
            _here.ask = before

    def _make(self, function: Callable, *inputs: Any) -> Any:
        if not self._places.issuperset(_places_of(inputs)):
            raise RuntimeError(f"what {function.__qualname__} is given is not made of weights")
        with torch.inference_mode(False), torch.no_grad():  # or nothing but inference could write to it again
            result = function(*inputs)
        self._made.append((function, inputs, result))
        self._places |= _places_of(result)
        return result

    def _next(self, made: Iterator[tuple[Callable, tuple, Any]], function: Callable, *inputs: Any) -> Any:
        expected, _, result = next(made, (None, (), None))
        if expected is not function:
            raise RuntimeError(f"{function.__qualname__} of the weights is asked for where something else was before")
        return result


def _places_of(tensors: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tensors) if isinstance(t, Tensor)}
