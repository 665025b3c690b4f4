"""Shared fixtures: the numerical tests run on the CPU and, where there is one, also on the GPU."""

import pytest
import torch


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    """Random inputs are the same in every run, whichever tests run before."""
    torch.manual_seed(0)


@pytest.fixture
def no_waiting(monkeypatch):
    """The hub's client tries again after 1, 2, 4, ... seconds without a network: not here."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
