"""Weights that are computed, and that take what is written into them back to what they are computed from.

``nn.init.orthogonal_(layer.weight)``, ``layer.weight.data.normal_()`` or ``layer.weight[0] = 0`` write into the
tensor that a parametrization has just computed, which the next call computes anew: in torch they are lost without a
word. A :class:`ComputedWeight` notices them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import DeviceContext

Tensor = torch.Tensor


def computed_weight(weight: Tensor, take: Callable[[Tensor], None]) -> Tensor:
    """``weight`` such that ``take`` is called with it after each write, where somebody may write.

    Whoever compiles, exports, transforms or listens gets the plain tensor, as does one of another class.
    """
    if type(weight) is not Tensor or torch.compiler.is_compiling() or watched():
        return weight
    made = weight.as_subclass(ComputedWeight)
    made.on_write = take
    return made


class ComputedWeight(Tensor):
    """A tensor like any other; what is made of it is plain, but for other handles on the same numbers.

    A write is one into the numbers: with gradients on, an operation in place on a weight that requires them is a
    step of a computation, as for any tensor that is no parameter.
    """

    on_write: Callable[[Tensor], None]
    whole: Tensor | None = None  # of which it is a view; None for the weight itself, which would never be freed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``func`` on plain tensors, and what it wrote is taken."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, ComputedWeight)), None)
            if given is None:  # in a list: nothing writes there
                return func(*args, **kwargs)
            version, differentiates = given._version, torch.is_grad_enabled() and given.requires_grad
            result = func(*args, **kwargs)
            replaced = func == _SET_DATA
            whole = given if given.whole is None or replaced else given.whole
            if replaced or (given._version != version and not differentiates):
                given.on_write(whole)
            if type(result) is Tensor and _address(result) == _address(given):
                result = result.as_subclass(ComputedWeight)
                result.on_write, result.whole = given.on_write, whole
            return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """That of a plain tensor: what is saved is the numbers."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call] # torch's


_SET_DATA: Any = vars(torch._C.TensorBase)["data"].__set__


def watched() -> bool:
    """Whether somebody traces, transforms or listens to torch's functions, and so has to see the plain ones."""
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    if not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call] # torch's
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
