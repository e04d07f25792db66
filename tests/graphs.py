"""What torch.compile makes of a function: the ops in its graphs."""

from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd


class Graphs:
    """A torch.compile backend that keeps the names of the ops in each graph, forward and backward apart."""

    def __init__(self) -> None:
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def into(graphs: list[list[str]]) -> Any:
            def keep(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
                graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
                return graph

            return keep

        return aot_autograd(fw_compiler=into(self.forward), bw_compiler=into(self.backward))(module, inputs)
