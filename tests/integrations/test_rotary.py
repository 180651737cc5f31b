"""Tables of cosines and sines in compiled models: made once, whatever the number of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from packflex.integrations._rotary import _keep
from packflex.integrations.transformers import enable_packflex
from packflex.testing.families import FAMILIES, tiny_model
from tests.integrations.rotary_code import IDS, LAYOUT, compiled_code, rotary_modules


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_tables(family: str) -> None:
    model = tiny_model(family)
    enable_packflex(model)
    enable_packflex(model)
    hooked = rotary_modules(model)
    assert hooked
    assert all(list(m._forward_hooks.values()).count(_keep) == 1 for m in hooked)
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = model(IDS, packed=LAYOUT).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend=keep_graph)(IDS, packed=LAYOUT).logits
    torch.testing.assert_close(found, expected)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    kept = [node for node in nodes if "kept_table" in str(node.target)]
    cosines = [node for node in nodes if node.target in ("cos", torch.cos)]
    assert cosines
    assert len(kept) == 2 * len(cosines), "cosines and sines of each table"


def test_sines_are_computed_once() -> None:
    kept, lost = (sum(code.count(".sin()") for code in compiled_code("cpu", keep)) for keep in (True, False))
    assert kept == 1
    assert lost > 3, "what this is for: the compiler computes them in every layer"


def test_other_embeddings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (torch.ones(2, 4), torch.ones(2, 4, requires_grad=True))
    module = torch.nn.Identity()
    plain = (torch.ones(2, 4), torch.zeros(2, 4))
    assert _keep(module, (), plain) is plain, "eager"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _keep(module, (), tables) is tables, "one that learns"
    assert _keep(module, (), tables[0]) is tables[0]
    one_token = (torch.ones(1, 4), torch.zeros(1, 4))
    assert _keep(module, (), one_token) is one_token
    kept = _keep(module, (), plain)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(kept, plain, strict=True))


@pytest.mark.filterwarnings("ignore:While compiling")  # of transformers' own collector of outputs
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_need_no_packflex(strict: bool) -> None:
    model = tiny_model("llama")
    enable_packflex(model)
    exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=strict)
    assert "packflex" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
