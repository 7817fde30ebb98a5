"""The model of the demo, where it has been fetched: its GGUF file gives the weights that Transformers gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcore.cli.demo_inputs import MODEL_MEMBER, default_cache
from qcore.formats.gguf import GgufSource


@pytest.mark.model
def test_the_real_gguf_file_gives_the_weights_of_transformers() -> None:
    path = default_cache() / MODEL_MEMBER.rsplit("/", 1)[1]
    if not path.is_file():
        pytest.skip("`make demo` has not fetched the model")
    source = GgufSource(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    assert state.keys() - source.tensors.keys() == {"lm_head.weight"}
    assert len(source.tensors) == 272
    for name in source.tensors:
        assert torch.equal(source.read(name), state[name]), name
    source.close()
