"""Model: a torch module and a loss, as functions of explicit parameters."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.func import functional_call
from torch.nn import functional

from fedsim import tree
from fedsim.task import Batch, Params
from fedsim.tree import Tree

Losses = Callable[[Tensor, Tensor], Tensor]  # outputs (B, ...), targets (B, ...) -> (B,)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(outputs)_target for each example, (B,)."""
    if peek_interpreter_stack() is not None and outputs.ndim == 2 and not targets.is_floating_point():
        # The same to the bit; torch's own is taken apart in Python under vmap, which costs more than it computes.
        return -functional.log_softmax(outputs, 1).gather(1, targets[:, None])[:, 0]
    return functional.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """|output - target|^2 / 2 for each example, (B,); outputs (B, 1) may be compared with targets (B,)."""
    if outputs.numel() != targets.numel():
        raise ValueError(f"outputs of shape {tuple(outputs.shape)} against targets of shape {tuple(targets.shape)}")
    difference = outputs.reshape(targets.shape) - targets  # (B, 1) minus (B,) would be (B, B)
    return 0.5 * difference[:, None].square().flatten(1).sum(1)


def gradient(loss: Callable[..., Tensor], params: Tree, *arguments: Any) -> tuple[Tensor, Tree]:
    """(loss(params, *arguments), its gradient with respect to params), by whichever means is right here.

    Outside vmap `torch.autograd.grad` on leaf copies is 1.2 to 2.7 times cheaper than `torch.func.grad`; inside it only
    the latter is allowed. A client never has to ask where it runs.
    """
    if peek_interpreter_stack() is not None:
        gradients, value = torch.func.grad_and_value(loss)(params, *arguments)
        return value, gradients
    with torch.enable_grad():
        copies = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        value = loss(copies, *arguments)
        if not value.requires_grad:  # the loss depends on none of them
            return value, tree.map(torch.zeros_like, params)
        parts = iter(torch.autograd.grad(value, tree.leaves(copies), materialize_grads=True))  # type: ignore[arg-type]
    return value.detach(), tree.map(lambda _: next(parts), params)


@dataclass(frozen=True, eq=False)
class Model:
    """A module whose parameters are given from outside, and the loss of its outputs.

    Parameters of the module that require no gradient, and its buffers, are constants of the model.
    """

    module: nn.Module
    criterion: Losses = cross_entropy
    inputs: str = "x"  # the column that the module reads
    target: str = "y"  # the column that the loss compares with

    def __post_init__(self) -> None:
        for name, part in self.module.named_modules():
            if not isinstance(part, nn.modules.batchnorm._NormBase):
                continue
            if part.track_running_stats:
                why = " with running statistics, which are neither parameters nor the same for two clients"
            elif isinstance(part, nn.modules.batchnorm._BatchNorm):
                why = ", which mixes the examples of a batch, those that only fill it up included"
            else:
                continue
            raise ValueError(f"module {name or 'itself'} is {type(part).__name__}{why}: use GroupNorm or LayerNorm")

    @cached_property
    def params(self) -> Params:
        """The parameters that the module was made with, copied."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters() if p.requires_grad}

    def release(self) -> None:
        """Forgets the copies of `params`, which are made again of the module when they are asked for."""
        self.__dict__.pop("params", None)

    def to(self, device: torch.device) -> "Model":
        """The same model with its constants on a device; this one stays where it is."""
        criterion = self.criterion
        if isinstance(criterion, nn.Module):
            criterion = copy.deepcopy(criterion).to(device)
        return replace(self, module=copy.deepcopy(self.module).to(device), criterion=criterion)

    @cached_property
    def stochastic(self) -> bool:
        """Whether the module draws random numbers while it is trained (dropout)."""
        return any(map(_draws, self.module.modules()))

    @cached_property
    def _tied(self) -> bool:
        """Whether two names stand for one parameter; where none do, looking for them at every call is a waste."""
        return len(list(self.module.parameters())) < len(list(self.module.named_parameters(remove_duplicate=False)))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for name, leaf in self.module.named_parameters() if leaf.requires_grad)

    def _check(self, params: Params) -> None:
        """Raises where a parameter is missing, for which torch would take the module's own unasked."""
        if missing := self._names.difference(params):
            there = ", ".join(sorted(params)) or "nothing"
            raise ValueError(f"the model needs {', '.join(sorted(missing))}, and is given only {there}")

    @cached_property
    def _trained(self) -> nn.Module:
        same = {id(leaf): leaf for leaf in self.module.parameters()}  # another state of the module, not its parameters
        return copy.deepcopy(self.module, same).eval()

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """The module's outputs while it is being trained, (B, ...)."""
        self._check(params)
        outputs: Tensor = functional_call(self.module, params, (batch[self.inputs],), tie_weights=self._tied)
        return outputs

    def predict(self, params: Params, batch: Batch) -> Tensor:
        """The module's outputs when it is used: without dropout, (B, ...)."""
        self._check(params)
        outputs: Tensor = functional_call(self._trained, params, (batch[self.inputs],), tie_weights=self._tied)
        return outputs

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The mean loss of the examples where "mask" holds, (); zero if there are none."""
        losses = self.criterion(self.outputs(params, batch), batch[self.target])
        return mean(losses, batch["mask"])

    def gradient(self, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        """(loss, its gradient)."""
        return gradient(self.loss, params, batch)


def _draws(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training: dropout, alone or inside recurrent layers and attention."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    inner = getattr(module, "dropout", 0.0)
    return isinstance(module, nn.RReLU) or (isinstance(inner, float) and inner > 0)


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values (B,) where the mask holds, (); zero if there are none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
