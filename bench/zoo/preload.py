"""Imported once by the server that forks a process for each row: what every row needs.

Explaining a small layer here fetches all that PyTorch's tracers import and build when first used, so that no
row has to wait for it.
"""

from __future__ import annotations

import logging
import os
import warnings

os.environ.update(OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

import torch  # noqa: E402
import transformers.modeling_utils  # noqa: E402, F401
from torch import nn  # noqa: E402

import fxlrp  # noqa: E402

from . import check  # noqa: E402, F401


def warm() -> None:
    """Explain a small layer."""
    torch.set_num_threads(1)
    layer = nn.Sequential(nn.Embedding(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    explainer = fxlrp.lrp_compile(layer.eval(), backend="eager")
    explainer(torch.tensor([[1, 2, 3], [4, 5, 6]])).ledger  # noqa: B018


warm()
