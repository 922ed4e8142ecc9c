"""Eval mode for a while: every module gets its own mode back."""

import pytest
import torch
from torch import nn

from sparsight.nn.evaluating import evaluating


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(), nn.ReLU())).train()
    model[0].eval()  # a frozen norm in a model that trains
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before
