"""The code that torch.compile makes of a small packed model of three layers, forward and backward."""

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from packflex import PackedLayout
from packflex.integrations.transformers import enable_packflex
from packflex.testing.families import VOCAB, tiny_model

LAYOUT = PackedLayout.from_lengths([[9, 14, 1, 8], [20, 11]], seq_len=36)
IDS = torch.randint(3, VOCAB, (2, 36), generator=torch.Generator().manual_seed(1))


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]


def compiled_code(device: str, keep: bool = True) -> list[str]:
    """With the tables of rotary embeddings kept, or as they would be; code out of a cache would not be shown."""
    model = tiny_model("llama", num_hidden_layers=3).train().to(device)
    enable_packflex(model)
    if not keep:
        for module in rotary_modules(model):
            module._forward_hooks.clear()
    ids, layout = IDS.to(device), LAYOUT.to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch(fx_graph_cache=False):
        codes: list[str] = run_and_get_code(lambda: compiled(ids, labels=ids, packed=layout).loss.backward())[1]
    return codes
