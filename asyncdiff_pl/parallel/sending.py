"""A value of any form from one rank to all of its pipeline: a tensor, or what has tensors somewhere in it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from asyncdiff_pl.parallel.exchange import Exchange


def from_rank(exchange: Exchange, value: Any, source: int, rank: int, device: torch.device) -> Any:
    """Gives all ranks of a pipeline a value that one of them has; each must call it, and the CPU waits for the device.

    What is around the tensors is pickled. Tensors come out to the bit, and in the order in memory that they had, so
    that what is computed from them is the same, too.

    Args:
        exchange: Messages of this rank.
        value: The value, on the source; others may give anything.
        source: Rank within the pipeline that has it.
        rank: This rank within the pipeline.
        device: Where tensors travel and arrive.

    Returns:
        The value: on the source the very same.
    """
    if rank == source:
        around, tensors = _pack(value)
        dense = [tensor.detach().to(device, copy=True) for tensor in tensors]
        forms = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in dense]
        _bytes_from_rank(exchange, pickle.dumps((around, forms)), source, device)
    else:
        around, forms = pickle.loads(_bytes_from_rank(exchange, None, source, device))
        dense = [torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in forms]
    exchange.broadcast([_memory(tensor) for tensor in dense if tensor.numel()], source)
    return value if rank == source else _unpack(around, dense)


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor without gaps, in their order in memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _bytes_from_rank(exchange: Exchange, data: bytes | None, source: int, device: torch.device) -> bytes:
    size = torch.tensor([0 if data is None else len(data)], device=device)
    exchange.broadcast([size], source)
    if data is None:
        sent = torch.empty(int(size), dtype=torch.uint8, device=device)
    else:
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    exchange.broadcast([sent], source)
    return sent.cpu().numpy().tobytes()


class _Packer(pickle.Pickler):
    """Pickles all but tensors, which it collects; one that is there twice is collected once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        number = self._numbers.setdefault(id(value), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(value)
        return number


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self._tensors[number]


def _pack(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    return file.getvalue(), packer.tensors


def _unpack(around: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    return _Unpacker(io.BytesIO(around), tensors).load()
