"""A forward pass written down once as a flat list of tensor operations, then repeated.

Modules of a Hugging Face model spend more time in Python than small ticks spend in mathematics. The
operations of a pass depend on its shapes alone, so they are recorded for each shape from a real
pass, with what depends on no input computed beforehand, and repeated without the modules. The
operations are the same, and so is every bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_log = logging.getLogger(__name__)

Pass: TypeAlias = Callable[..., tuple[Tensor, ...]]

_aten = torch.ops.aten
# The same operations by names that Python reaches faster.
_FASTER: dict[Any, Any] = {
    _aten.view.default: torch.reshape,
    _aten._unsafe_view.default: torch.reshape,
    _aten.addmm.default: torch.addmm,
    _aten.mm.default: torch.mm,
    _aten.add.Tensor: torch.add,
    _aten.mul.Tensor: torch.mul,
    _aten.gelu.default: torch._C._nn.gelu,
    _aten.relu.default: torch.relu,
    _aten.silu.default: torch._C._nn.silu,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.embedding.default: torch.embedding,
    _aten.native_layer_norm.default: torch.native_layer_norm,
}


_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


def recorded(run: Pass, inputs: Sequence[Tensor], replace: dict[Any, Any] | None = None) -> Pass:
    """`run` for inputs of the shapes of `inputs`; itself where it cannot be recorded.

    `replace` maps operations to functions that take their place. `run` does what it does several
    times for these inputs, and the record is used only if it gives the same bits.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            expected = run(*inputs)
            recorder = _Recorder(inputs)
            with recorder:
                out = run(*inputs)
            again = recorder.finished(out, _FASTER | (replace or {}))
            if not all(map(_same_bits, expected, again(*inputs))):
                raise ValueError("other bits than those of the modules")
    except Exception as error:
        # A model that looks into its tensors cannot be recorded, and serves all the same.
        _log.warning("a forward pass cannot be recorded, which is slower: %s", type(error).__name__)
        return run
    return again


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where a number is none, which is equal to nothing."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation between modules and mathematics, and writes down those on inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = fx.Graph()
        self._constants: list[Tensor] = []
        self._seen: list[Tensor] = []  # kept alive, so that their ids stay their own
        self._nodes: dict[int, fx.Node] = {}
        for i, tensor in enumerate(inputs):
            self._last_input = self._graph.placeholder(f"input_{i}")
            self._see(tensor, self._last_input)
        self._moving = set(self._nodes)  # ids of what depends on the inputs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute; write down unless the result is the same for all inputs."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(id(x) in self._moving for x in given):
            return out
        parts = out if isinstance(out, tuple | list) else (out,)
        if func._schema.is_mutable or not all(isinstance(x, Tensor) for x in parts):
            raise ValueError("this pass writes in place or looks into its tensors")
        node = self._graph.call_function(func, *tree_map(self._node_of, (args, kwargs)))
        for i, part in enumerate(parts):
            of_part = node if part is out else self._graph.call_function(getitem, (node, i))
            self._see(part, of_part)
            self._moving.add(id(part))
        return out

    def finished(self, out: Sequence[Tensor], faster: dict[Any, Any]) -> Pass:
        """The record as a function of the inputs that returns what `out` was."""
        graph = self._graph
        graph.output(tuple(map(self._node_of, out)))
        for node in graph.nodes:
            # A view of a view is one view.
            while node.target in _VIEWS and node.args[0].target in _VIEWS:
                node.replace_input_with(node.args[0], node.args[0].args[0])
        graph.eliminate_dead_code()
        for node in graph.nodes:
            node.target = faster.get(node.target, node.target)
        forward, constants = fx.GraphModule(torch.nn.Module(), graph).forward, self._constants

        def again(*inputs: Tensor) -> tuple[Tensor, ...]:
            made: tuple[Tensor, ...] = forward(*inputs, *constants)
            return made

        return again

    def _see(self, tensor: Tensor, node: fx.Node) -> None:
        self._seen.append(tensor)
        self._nodes[id(tensor)] = node

    def _node_of(self, x: Any) -> Any:
        """What stands for a tensor in the graph: those that depend on no input are more inputs."""
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._nodes:
            with self._graph.inserting_after(self._last_input):
                self._last_input = self._graph.placeholder(f"constant_{len(self._constants)}")
            self._constants.append(x)
            self._see(x, self._last_input)
        return self._nodes[id(x)]
