"""What training changes and has to leave as it was: generators, switches, the model's config, dtypes, hooks and device."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import get_verbosity, set_verbosity

from .probes import device_of


@contextmanager
def process_undisturbed() -> Iterator[None]:
    """Trainer seeds every generator there is, and its arguments throw switches of the process; all are as before afterwards."""
    python, numpy, environment, cudnn = random.getstate(), np.random.get_state(), dict(os.environ), torch.backends.cudnn
    switches = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    of_cudnn, verbosity = (cudnn.deterministic, cudnn.benchmark), get_verbosity()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.use_deterministic_algorithms(switches[0], warn_only=switches[1])
            cudnn.deterministic, cudnn.benchmark = of_cudnn
            set_verbosity(verbosity)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


@contextmanager
def trainable(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The parameters `names` want gradients, all are in single precision or better; dtypes are put back, gradients are gone."""
    dtypes = {}
    for name, parameter in model.named_parameters():
        dtypes[name] = parameter.dtype
        if names:  # what stays frozen has to compute with what trains
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def values_restored_on_error(model: nn.Module) -> Iterator[None]:
    """Every parameter has its old values back, bit for bit and on its old device, if the enclosed work fails."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, value in before:
        parameter.data = value.clone()
    try:
        yield
    except BaseException:
        for parameter, value in before:
            parameter.data = value
        raise


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Trainer writes into the model's config; mixed precision and checkpointing of activations are switched on and stay so.

    And accelerate notes that it has prepared the model, which it then would not do again: the next Trainer's mixed precision and
    its exchange of gradients between processes would silently be off.
    """
    config, own, switch = dict(vars(model.config)), model.__dict__, "gradient_checkpointing"
    switches = [(each, getattr(each, switch)) for each in model.modules() if hasattr(each, switch)]
    noted = [(name, own.get(name)) for name in ("forward", "_original_forward", "_is_accelerate_prepared")]
    try:
        yield
    finally:
        for module, before in switches:
            setattr(module, switch, before)
        vars(model.config).clear()
        vars(model.config).update(config)
        for name, value in noted:
            own.pop(name, None)
            own.update({} if value is None else {name: value})


@contextmanager
def lent(model: PreTrainedModel) -> Iterator[None]:
    """Trainer moves the model to the device that it trains on.

    And transformers, asked for hidden states, hangs hooks into the model that stay, and notes that they hang there.
    """
    device, spread, noted = device_of(model), getattr(model, "hf_device_map", None), "_output_capturing_hooks_installed"
    hooks = [(module, set(module._forward_hooks), noted in module.__dict__) for module in model.modules()]
    try:
        yield
    finally:
        for module, own, was_noted in hooks:
            for hook in module._forward_hooks.keys() - own:
                del module._forward_hooks[hook]
            if not was_noted:
                module.__dict__.pop(noted, None)
        if spread is None:
            model.to(device)
