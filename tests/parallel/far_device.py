"""A device on which the CPU must wait for values, as a GPU is, on a machine without one.

Its tensors say that they are on "meta" and hold CPU tensors, which the operations run on. While it is watched, what
would make a CPU wait for a GPU raises: reading a value, looking for indices, copying from or to memory that is not
pinned. So does what a GPU cannot do at all: an operation on tensors of both devices, numbers excepted.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trees import leaves, mapped

FAR = torch.device("meta")
aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
}
"""What gives Python a value, or a tensor whose size depends on one."""


class WaitsError(Exception):
    """The CPU would wait for the device."""


class Far(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR
        )

    def __init__(self, near):
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        # the mode did not take it: another kind of tensor is among its arguments, which knows what to do
        return NotImplemented


def near(value):
    """What the device computed, to look at."""
    return mapped(lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, value)


class _Numbers(TorchFunctionMode):
    """Makes tensors of Python's numbers on the CPU and copies them, and the reverse: torch does so unseen."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == FAR:
            return function(*args, **kwargs | {"device": "cpu"}).to(FAR)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list) and isinstance(args[0], Far):
            args = args[0], torch.tensor(args[1]).to(FAR)
        if function in (torch.Tensor.__float__, torch.Tensor.tolist) and isinstance(args[0], Far):
            self.device.wait(function)
            args = near(args)
        return function(*args, **kwargs)


class FarDevice(TorchDispatchMode):
    """The device; within this context tensors can be moved to it.

    Args:
        watched: Whether waiting raises from the start.
    """

    def __init__(self, watched=False):
        super().__init__()
        self.is_watched = watched
        self.uploads = 0
        self._pinned = set()
        self._numbers = _Numbers(self)

    def __enter__(self):
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    @contextlib.contextmanager
    def watch(self, on=True):
        before, self.is_watched = self.is_watched, on
        try:
            yield
        finally:
            self.is_watched = before

    def put(self, value):
        """Puts tensors, or a module's parameters and buffers, on the device."""
        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                for name, weight in module._parameters.items():
                    if weight is not None:
                        module._parameters[name] = torch.nn.Parameter(Far(weight.data), requires_grad=False)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = Far(buffer)
            return value
        return mapped(lambda leaf: Far(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(type(leaf) not in (torch.Tensor, torch.nn.Parameter, Far) for leaf in tensors):
            return NotImplemented
        is_far = any(isinstance(leaf, Far) for leaf in tensors)
        if function is aten._pin_memory.default:
            pinned = args[0].clone()
            self._pinned.add(pinned.data_ptr())
            return pinned
        if function is aten.is_pinned.default:
            return args[0].data_ptr() in self._pinned
        if function in (aten._to_copy.default, aten.copy_.default):
            return self._copy(function, args, kwargs)
        to_far = torch.device(kwargs.get("device") or "cpu") == FAR
        if not is_far and not to_far:
            return function(*args, **kwargs)
        if is_far and function in READS:
            self.wait(function)
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            # a mask or a list of positions: the first has an unknown number, the second is uploaded
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or not isinstance(index, Far)):
                    self.wait(function)
        elif any(not isinstance(leaf, Far) and leaf.ndim for leaf in tensors):
            raise RuntimeError(f"{function} of tensors on two devices")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = function(*near(args), **near(kwargs))
        return mapped(lambda leaf: self._wrapped(leaf, args), result)

    def _wrapped(self, leaf, args):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        # in place: the same tensor comes back
        same = (x for x in leaves(args) if isinstance(x, Far) and x.near is leaf)
        found = next(same, None)
        return Far(leaf) if found is None else found

    def _copy(self, function, args, kwargs):
        if function is aten.copy_.default:
            target, source = args[:2]
            is_async = len(args) > 2 and args[2]
            self._check_copy(function, source, isinstance(target, Far), is_async)
            near(target).copy_(near(source))
            return target
        source, device = args[0], kwargs.pop("device", None)
        to_far = isinstance(source, Far) if device is None else torch.device(device) == FAR
        self._check_copy(function, source, to_far, kwargs.get("non_blocking", False))
        copied = function(near(source), **kwargs)
        return Far(copied) if to_far else copied

    def _check_copy(self, function, source, to_far, is_async):
        if isinstance(source, Far) == to_far:
            return
        self.uploads += to_far
        if not (is_async and to_far and source.data_ptr() in self._pinned):
            self.wait(function)

    def wait(self, function):
        """The CPU waits for the device, because of a function."""
        if self.is_watched:
            raise WaitsError(f"{function} makes the CPU wait")
