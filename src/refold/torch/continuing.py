"""Training on after a fold, with the optimizer that there is."""

from __future__ import annotations

import torch
from torch import nn

from refold.names import nearest


def continue_training(optimizer: torch.optim.Optimizer, model: nn.Module, plain: nn.Module) -> list[str]:
    """Let ``optimizer``, which trained ``model``, train ``plain``, which :func:`refold.fold` made of it.

    The optimizer stays the same object, with its groups, learning rates and schedulers. In each group, the
    parameters of ``model`` give way to those of ``plain`` that require gradients; each goes to the group of the
    parameter that it shares the longest name with. A parameter that was not folded (of the same name and the same
    numbers) keeps its state, such as moments. A folded one starts without: the moments were those of other numbers.

    Returns:
        The names of the parameters of ``plain`` that start without a state.

    Raises:
        ValueError: the optimizer trains none of the model's parameters.
    """
    old = dict(model.named_parameters())
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in old.items() if id(parameter) in groups}
    if not trained:
        raise ValueError("the optimizer trains none of the model's parameters")
    states = {id(parameter): optimizer.state.pop(parameter, None) for parameter in trained.values()}
    gone = {id(parameter) for parameter in old.values()}
    for group in optimizer.param_groups:
        kept = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for key in ("params", "param_names") if "param_names" in group else ("params",):
            group[key] = [group[key][index] for index in kept]
    anew = []
    for name, parameter in plain.named_parameters():
        if not parameter.requires_grad:
            continue
        before = nearest(name, trained)
        group = groups[id(trained[before])]
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
        same = before == name and torch.equal(trained[before].detach(), parameter.detach())
        if same and states[id(trained[before])] is not None:
            optimizer.state[parameter] = states[id(trained[before])]
        else:
            anew.append(name)
    return anew
