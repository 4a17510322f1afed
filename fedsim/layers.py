"""The layers of a network that is a chain: which of its parameters belong to which neurons, and what these say."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch.fx
from torch import nn

from fedsim.task import Params

# What leaves neurons where they are, as module or as function; names in lower case, without underscores.
KEEPS = frozenset((
    "identity", "contiguous", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "featurealphadropout",
    "relu", "relu6", "leakyrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid", "logsigmoid",
    "softplus", "softsign", "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink",
))  # fmt: skip
POOLING = ("maxpool", "avgpool", "lppool", "adaptivemaxpool", "adaptiveavgpool")
POOLS = frozenset(f"{kind}{axes}d" for kind in POOLING for axes in (1, 2, 3))
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Layer(NamedTuple):
    """A layer and what goes with its neurons.

    Attributes:
        weight: the name of its weight, (neurons, inputs, ...); "" for the network's inputs.
        neurons: n.
        names: the parameters that have an entry, or several in a row, for each neuron: weight, bias, those of norms.
        axes: of a neuron's output, 0 for a number; behind a convolution until that is flattened, more.
        groups: consecutive blocks of neurons between which none may be exchanged; 1: all may.
        hidden: whether the order of its neurons is nobody's business: not that of inputs or outputs.
    """

    weight: str
    neurons: int
    names: tuple[str, ...]
    axes: int = 0
    groups: int = 1
    hidden: bool = True


def chain(network: nn.Module) -> list[Layer]:
    """The layers in the order in which examples pass them; the first stands for the inputs, and has norms of theirs.

    Raises:
        ValueError: it is no chain of linear layers and convolutions, activations, pooling and norms.
    """
    try:
        nodes = list(torch.fx.Tracer().trace(network).nodes)
    except Exception as error:  # it branches on values, or is not for tracing at all
        raise ValueError(f"{type(network).__name__} is no chain of layers: it cannot be traced: {error}") from error
    found = [Layer("", 0, (), hidden=False)]
    for before, node in zip(nodes, nodes[1:], strict=False):
        if node.all_input_nodes != [before]:
            reads = ", ".join(str(other) for other in node.all_input_nodes) or "nothing before it"
            _refuse(node, f"reads {reads}; each part must read what the one before it, {before}, gives, and only that")
        if node.op != "output":
            _extend(found, node, network)
    found[-1] = found[-1]._replace(hidden=False)
    names = [name for layer in found for name in layer.names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is used twice: its neurons would have two places")
    return found


def check_covered(layers: Sequence[Layer], params: Params) -> None:
    """Raises ValueError where the parameters are not those of the layers: one too many, or one that is not trained."""
    covered = {name for layer in layers for name in layer.names}
    for name in sorted(covered ^ params.keys()):
        why = "belongs to no layer of its network" if name in params else "is not among the parameters to train"
        raise ValueError(f"it cannot be told whose neurons these are: {name} {why}")


def hidden_outputs(network: nn.Module) -> torch.fx.GraphModule:
    """The same network with the same parameters, as it is used (no dropout), that tells what its hidden layers do.

    It gives the outputs of each hidden layer itself, before norm and activation, (n, neurons, ...), as a tuple, in the
    order of `chain`. Unlike hooks this changes no module, and runs wherever the network does, under vmap as well.

    Raises:
        ValueError: as `chain`.
    """
    wanted = {layer.weight for layer in chain(network) if layer.hidden}
    used = copy.deepcopy(network, {id(leaf): leaf for leaf in network.parameters()}).eval()
    graph = torch.fx.Tracer().trace(used)
    told = tuple(node for node in graph.nodes if node.op == "call_module" and f"{node.target}.weight" in wanted)
    (end,) = (node for node in graph.nodes if node.op == "output")
    end.args = (told,)
    return torch.fx.GraphModule(used, graph)


def _extend(found: list[Layer], node: torch.fx.Node, network: nn.Module) -> None:
    """Adds a layer, or what a part has for the neurons of the last one."""
    part: Any = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    names = tuple(f"{node.target}.{name}" for name, _ in part.named_parameters()) if part is not None else ()
    last = found[-1]
    if isinstance(part, LAYERS):
        found.append(_layer(last, part, names, node))
    elif isinstance(part, NORMS):
        found[-1] = _normed(last, part, names, node)
    elif names:
        _refuse(node, f"holds {names[0]}, and is neither a linear layer nor a convolution, nor a norm without memory")
    else:
        word = type(part).__name__ if part is not None else getattr(node.target, "__name__", str(node.target))
        word = word.lower().replace("_", "")
        if _flattens(word, part, node):
            found[-1] = last._replace(axes=0)
        elif word not in KEEPS and not (word in POOLS and (last.axes or not last.weight)):
            _refuse(node, f"({word}) may mix neurons, or give them other places")


def _flattens(word: str, part: Any, node: torch.fx.Node) -> bool:
    """Whether all axes but the first, that of the examples, become one."""
    if part is not None:
        return word == "flatten" and (part.start_dim, part.end_dim) == (1, -1)
    given = node.args[1:]
    if word == "flatten":
        return given == (1,) or (not given and node.kwargs == {"start_dim": 1})
    sizes = given[0] if len(given) == 1 else given
    return word in ("view", "reshape") and isinstance(sizes, tuple | list) and len(sizes) == 2


def _layer(last: Layer, part: Any, names: tuple[str, ...], node: torch.fx.Node) -> Layer:
    """A linear layer or a convolution behind the last layer."""
    weight = f"{node.target}.weight"
    size, inputs, *window = part.weight.shape
    if surplus := set(names) - {weight, f"{node.target}.bias"}:
        _refuse(node, f"has a weight that is made of others, such as {min(surplus)}")
    if getattr(part, "groups", 1) > 1:
        _refuse(node, f"is a convolution of {part.groups} groups, whose {weight} ties inputs to neurons")
    if last.weight and (last.axes != len(window) or inputs % last.neurons or (window and inputs != last.neurons)):
        behind = f"{last.neurons} neurons of {last.weight}, each with an output of {last.axes} axes"
        _refuse(node, f"has a {weight} of shape {tuple(part.weight.shape)}, which does not read {behind}: flatten them")
    return Layer(weight, size, names, len(window))


def _normed(last: Layer, part: Any, names: tuple[str, ...], node: torch.fx.Node) -> Layer:
    """The last layer, its neurons normed."""
    if not last.weight:
        return last._replace(names=last.names + names)
    if isinstance(part, nn.LayerNorm):
        shape = part.normalized_shape
        fits = shape[0] % last.neurons == 0 if not last.axes else shape[0] == last.neurons
        if len(shape) != last.axes + 1 or not fits:
            _refuse(node, f"norms {tuple(shape)}, not all {last.neurons} neurons of {last.weight} together")
        return last._replace(names=last.names + names)
    channels = part.num_channels if isinstance(part, nn.GroupNorm) else part.num_features
    if channels != last.neurons:
        _refuse(node, f"norms {channels} channels, and {last.weight} has {last.neurons} neurons")
    groups = part.num_groups if isinstance(part, nn.GroupNorm) and part.num_groups < channels else 1
    return last._replace(names=last.names + names, groups=math.lcm(last.groups, groups))


def _refuse(node: torch.fx.Node, why: str) -> NoReturn:
    raise ValueError(f"the network is no chain of layers that are known: {node.target} {why}")
