"""Shared fixtures. The Triton kernels run in Triton's interpreter where there is no GPU, so that they are tested everywhere."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before anything imports triton

import pytest

import weights
from model import Llama
from tokenizer import Tokenizer


@pytest.fixture(scope="session")
def default_gguf():
    """Path of the default LLM's weights, downloaded on first use."""
    return weights.find(weights.DEFAULT_LLM)


@pytest.fixture(scope="session")
def smollm(default_gguf):
    """The default LLM in float32, on its real weights. Tests must leave it as it is."""
    return Llama.from_pretrained(default_gguf)


@pytest.fixture(scope="session")
def smollm_tokenizer(default_gguf):
    return Tokenizer.from_pretrained(default_gguf)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
