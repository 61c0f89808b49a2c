"""Layers that `torch.compile` compiles, which takes half a minute: their gradients equal those of the plain model."""

import shutil

import pytest
import torch

from tests.support import tiny_models
from tests.support.gradients import compute_gradient
from trimtab.model.layer_transforms import compile_layers


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_layers_give_equal_gradient(family, tmp_path):
    base = tiny_models.make_base_model(tiny_models.FAMILIES[family], tmp_path / family)
    expected, model = compute_gradient(base, base.load("fp32"), packs=False), base.load("fp32")
    compile_layers(model)
    torch.testing.assert_close(compute_gradient(base, model), expected, rtol=1e-3, atol=1e-5)
