"""What a backward pass computes again in place of keeping it from the forward pass.

Autograd keeps what gradients ask for: of a norm its input, and of the convolution behind it the same map, normed and
activated. Such maps at full resolution are nearly all of a training step's memory, and most of them are made at the
speed of memory from another one that is kept anyway. Operators tell of such results how they are made
(:func:`can_be_made_again`); inside :func:`keeping_little` autograd then keeps the recipe in their place. The backward
pass follows it when a gradient asks for the map first, and holds the map until the last of them has had it. The same
kernels see the same numbers, so gradients are the same bit for bit.

It is for GPUs, where memory is short and these kernels take a fortieth of a step; on a CPU everything is kept. A
compiler decides by itself what to compute again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from nnunet_lgms.ops.backend import use_kernels

LEAST = 1 << 23  # bytes of a map that is worth the launches of a kernel

Result = TypeVar("Result")
# Recipes of the maps that are alive, by their storage: what autograd keeps may be a view of what an operator returned.
_recipes: ContextVar[WeakIdKeyDictionary | None] = ContextVar("recipes", default=None)


class _Recipe:
    """A map that is made when it is asked for first, and held until all have asked for it."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Any]):
        self._function, self._inputs = function, inputs
        self._waiting, self._made = 0, None  # the former is below 0 where a graph is kept and gone through again

    def promise(self) -> _Recipe:
        """To one who will ask for the map."""
        self._waiting += 1
        return self

    def __call__(self) -> Tensor:
        made = self._made
        if made is None:
            with torch.no_grad():
                made = self._function(*[kept() if callable(kept) else kept for kept in self._inputs])
        self._waiting -= 1
        self._made = made if self._waiting > 0 else None
        return made


def keeping_little(function: Callable[[Tensor], Result], x: Tensor) -> Result:
    """``function(x)``, whose backward pass makes again what operators can, where the kernels run."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and use_kernels(x) and _hooks_are_allowed()):
        return function(x)
    recipes = WeakIdKeyDictionary()
    before = _recipes.set(recipes)
    try:
        with saved_tensors_hooks(partial(_keep, recipes), lambda kept: kept()):
            return function(x)
    finally:
        _recipes.reset(before)
        recipes.clear()


def can_be_made_again(out: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Says of a result that it is ``function(*inputs)``, and returns it.

    Args:
        out: whose memory is its own.
        function: gives the same numbers in the same memory format whenever it is called; autocast may be off then.
        inputs: tensors, which are kept, or their recipes; None or settings.
    """
    recipes = None if torch.compiler.is_compiling() else _recipes.get()
    if recipes is not None and out.numel() * out.element_size() >= LEAST:
        inputs = [_keep(recipes, i.detach()) if isinstance(i, Tensor) else i for i in inputs]
        recipes[out.untyped_storage()] = _Recipe(function, inputs)
    return out


def _hooks_are_allowed() -> bool:
    """The transforms of ``torch.func`` refuse them."""
    return torch._C._autograd._saved_tensors_hooks_is_enabled()


def _keep(recipes: WeakIdKeyDictionary, tensor: Tensor) -> Callable[[], Tensor]:
    """A function that gives the tensor."""
    recipe = recipes.get(tensor.untyped_storage())
    if recipe is None:
        return partial(_unchanged, tensor, tensor._version)
    return partial(_view, recipe.promise(), tensor.size(), tensor.stride(), tensor.storage_offset())


def _view(recipe: _Recipe, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    return recipe().as_strided(size, stride, offset)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """Autograd's own check, which it leaves to the hooks."""
    if tensor._version != version:
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place after the "
            "forward pass: change a copy, or change it after the backward pass."
        )
    return tensor
