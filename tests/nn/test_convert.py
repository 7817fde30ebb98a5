"""``convert_module_to_linear4bit`` and ``convert_module_to_linear8bit``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qcore.errors import InvalidArgument, InvalidDtype
from qcore.nn import Linear4bit, Linear8bitLt, convert_module_to_linear4bit, convert_module_to_linear8bit

pytestmark = pytest.mark.usefixtures("backend")

CONVERTERS = [(convert_module_to_linear4bit, Linear4bit), (convert_module_to_linear8bit, Linear8bitLt)]
each_converter = pytest.mark.parametrize(("convert", "kind"), CONVERTERS, ids=["4bit", "8bit"])


class Block(nn.Module):
    def __init__(self, dim=64):
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 50, bias=False)

    def forward(self, index):
        x = self.embed(index)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


@each_converter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_layers_are_replaced_in_place(convert, kind, dtype):
    model = Model().to(dtype).eval()
    original, index = copy.deepcopy(model), torch.randint(0, 50, (2, 9))
    seen = []
    assert convert(model, progress=lambda *done: seen.append(done)) is model
    names = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert seen == [(name, i + 1, 4) for i, name in enumerate(names)]
    for name in names:
        layer, old = model.get_submodule(name), original.get_submodule(name)
        assert type(layer) is kind
        assert not layer.training
        assert (layer.in_features, layer.out_features) == (old.in_features, old.out_features)
        assert (layer.bias is None) == (old.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, old.bias)
        assert layer.bias is None or layer.bias.requires_grad
        by_hand = kind(
            old.in_features,
            old.out_features,
            **({"quant_type": "nf4"} if kind is Linear4bit else {"has_fp16_weights": False}),
        )
        by_hand = by_hand.to(dtype)
        by_hand.weight.data.copy_(old.weight.data)
        assert torch.equal(by_hand.to("cpu").weight.data, layer.weight.data)
    assert type(model.lm_head) is nn.Linear
    got, want = model(index).float(), original(index).float()
    assert (got - want).norm() < 0.2 * want.norm()
    assert not torch.equal(got, want)


@each_converter
def test_names_are_skipped_whole_or_in_part(convert, kind):
    def left(*skip):
        model = convert(Model(), skip)
        return sorted(name for name, module in model.named_modules() if type(module) is nn.Linear)

    assert left() == []
    assert left("lm_head", "blocks.0.up") == ["blocks.0.up", "lm_head"]
    assert left("blocks.1") == ["blocks.1.down", "blocks.1.up"]
    assert left("down") == ["blocks.0.down", "blocks.1.down"]
    assert left("own", "block") == []


@each_converter
def test_a_lone_layer_is_returned_anew(convert, kind):
    layer = nn.Linear(64, 32)
    weight = layer.weight.clone()
    assert type(convert(layer)) is kind
    assert torch.equal(layer.weight, weight)


@each_converter
def test_tied_weights_stay_tied(convert, kind):
    model = Model()
    model.lm_head.weight = model.embed.weight
    model.blocks[1].up.weight = model.blocks[0].up.weight
    model.twice = model.blocks[0].down
    convert(model, ())
    assert type(model.lm_head) is nn.Linear, "the embedding keeps its table, so the head keeps it too"
    assert model.lm_head.weight is model.embed.weight
    assert type(model.blocks[0].up) is kind
    assert model.blocks[1].up is not model.blocks[0].up
    assert model.blocks[1].up.weight is model.blocks[0].up.weight
    assert model.twice is model.blocks[0].down
    assert model(torch.randint(0, 50, (1, 4))).shape == (1, 4, 50)
    assert len({name for name, _ in model.named_parameters() if name.endswith("up.weight")}) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@each_converter
def test_owners_that_rely_on_their_weight_keep_it(convert, kind):
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(64, 4, batch_first=True),
            "normed": torch.nn.utils.weight_norm(nn.Linear(64, 64)),
            "plain": nn.Linear(64, 64),
        }
    )
    convert(model)
    assert type(model["plain"]) is kind
    assert not isinstance(model["attention"].out_proj, kind)
    assert type(model["normed"]) is nn.Linear
    x = torch.randn(2, 3, 64)
    model["attention"](x, x, x)
    again = convert(model)["plain"]
    assert again is model["plain"]


@each_converter
def test_hooks_go_over_and_can_be_removed(convert, kind):
    model, calls = nn.Sequential(nn.Linear(64, 64)), []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    convert(model)(torch.randn(1, 64))
    assert calls == ["before", "after"]
    handle.remove()
    model(torch.randn(1, 64))
    assert calls == ["before", "after", "before"]


@each_converter
def test_a_meta_model_is_converted_empty(convert, kind):
    with torch.device("meta"):
        model = Model()
    convert(model)
    assert type(model.blocks[0].up) is kind
    assert model.blocks[0].up.weight.is_meta
    assert model.blocks[0].up.weight.is_floating_point()
    source = Model()
    model.load_state_dict(source.state_dict(), assign=True)
    index = torch.randint(0, 50, (2, 3))
    assert torch.equal(model.to("cpu")(index), convert(source)(index))


@each_converter
def test_wrong_arguments_are_named(convert, kind):
    with pytest.raises(InvalidArgument, match="model is a dict"):
        convert({"weight": torch.randn(2, 2)})
    with pytest.raises(InvalidArgument, match="skip_modules"):
        convert(Model(), "lm_head")
    model = Model()
    model.blocks[1].double()
    with pytest.raises(InvalidDtype, match=r"blocks\.1\.up\.weight is torch\.float64"):
        convert(model)
    assert type(model.blocks[0].up) is nn.Linear


def test_a_model_of_float_weights_is_trained():
    model = convert_module_to_linear8bit(nn.Sequential(nn.Linear(64, 8)), has_fp16_weights=True)
    assert model[0].weight.requires_grad
    model(torch.randn(3, 64)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
