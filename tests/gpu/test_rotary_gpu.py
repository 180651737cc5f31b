"""Tables of cosines and sines in models compiled for a GPU, with the compiler of the torch that is installed there."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from packflex import PackedLayout
from packflex.integrations.transformers import enable_packflex
from packflex.testing.families import VOCAB, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_one_kernel_computes_sines():
    """Kernels of one code are printed once: without kept tables one forward and one or two backward print them."""
    model = tiny_model("llama", num_hidden_layers=3).train().to("cuda")
    enable_packflex(model)
    layout = PackedLayout.from_lengths([[9, 14, 1, 8], [20, 11]], seq_len=36).to("cuda")
    ids = torch.randint(3, VOCAB, (2, 36), device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch(fx_graph_cache=False):
        codes = run_and_get_code(lambda: compiled(ids, labels=ids, packed=layout).loss.backward())[1]
    assert sum(code.count("math.sin(") for code in codes) == 1
    assert any("kept_table" in code for code in codes)
