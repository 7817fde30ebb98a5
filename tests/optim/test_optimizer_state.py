"""State goes to bitsandbytes 0.50.2 and back bit for bit, comes from torch.optim, and is refused if it does not fit."""

from __future__ import annotations

import copy
import io
from typing import Any

import bitsandbytes.optim as B
import pytest
import torch
from torch import Tensor, nn

from cases import gradients, run
from qcore import optim
from qcore.errors import FormatError
from qcore.optim.codes import codebook, decode_rows, encode_rows

WRAPPER = "__bnb_optimizer_quant_state__"
SHAPE = (40, 32)  # five full blocks
FAMILIES: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 1e-2, "weight_decay": 0.1},
    "AdamW": {"lr": 1e-2},
    "Lion": {"lr": 1e-3},
    "LAMB": {"lr": 1e-2},
    "LARS": {"lr": 1e-1, "momentum": 0.9},
    "SGD": {"lr": 1e-2, "momentum": 0.9},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 1e-2},
    "AdEMAMix": {"lr": 1e-3},
}


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    flat = {**{key: value for key, value in state.items() if key != WRAPPER}, **state.get(WRAPPER, {})}
    # unorm_vec is where bitsandbytes sums up a norm: it has to be there, and what is in it does not matter.
    return {key: value for key, value in flat.items() if isinstance(value, Tensor) and key != "unorm_vec"}


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert int(state["step"]) == int(second["state"][key]["step"])
        ours, theirs = tensors(state), tensors(second["state"][key])
        assert ("unorm_vec" in state[WRAPPER]) == ("unorm_vec" in second["state"][key][WRAPPER])
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype
            assert torch.equal(value, theirs[name]), name


def make(library: Any, family: str, bits: int, param: nn.Parameter) -> Any:
    # bitsandbytes' AdEMAMix32bit has room for one of its two averages only, and fails.
    name = "AdEMAMix" if (library, family, bits) == (B, "AdEMAMix", 32) else f"{family}{bits}bit"
    return getattr(library, name)([param], **FAMILIES[family], min_8bit_size=0)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_bitsandbytes_state_comes_and_goes_bit_for_bit(family: str, bits: int) -> None:
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 3)
    theirs = make(B, family, bits, nn.Parameter(start.clone()))
    run(theirs, grads)
    saved = theirs.state_dict()

    param = nn.Parameter(start.clone())
    ours = make(optim, family, bits, param)
    ours.load_state_dict(saved)
    assert_same_state(ours.state_dict(), saved)
    assert WRAPPER in ours.state_dict()["state"][0]
    run(ours, grads)  # what was loaded can be stepped, in the codebook that it is in

    back = make(B, family, bits, nn.Parameter(start.clone()))
    back.load_state_dict(ours.state_dict())
    assert_same_state(back.state_dict(), ours.state_dict())
    assert back.state_dict()["param_groups"][0]["lr"] == FAMILIES[family]["lr"]
    run(back, grads)


def test_loading_shares_nothing_with_what_was_loaded() -> None:
    grads = gradients(SHAPE, 3)
    source = make(optim, "AdamW", 8, nn.Parameter(torch.randn(SHAPE)))
    run(source, grads)
    saved = copy.deepcopy(source.state_dict())
    target = make(optim, "AdamW", 8, nn.Parameter(torch.randn(SHAPE)))
    target.load_state_dict(source.state_dict())
    run(target, grads)
    assert_same_state(source.state_dict(), saved)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("LAMB", "LARS")])
def test_8_bit_steps_from_bitsandbytes_state_stay_near_its_own(family: str) -> None:
    """Five more steps each from one state: apart by less than a tenth of what they moved.

    bitsandbytes leaves the limit out of 8-bit LAMB and LARS (QC-OPT-008).
    """
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 8)
    theirs_param = nn.Parameter(start.clone())
    theirs = make(B, family, 8, theirs_param)
    run(theirs, grads[:3])
    middle = theirs_param.detach().clone()
    ours_param = nn.Parameter(middle.clone())
    ours = make(optim, family, 8, ours_param)
    ours.load_state_dict(theirs.state_dict())
    run(ours, grads[3:])
    run(theirs, grads[3:])
    assert (ours_param - theirs_param).norm() < 0.1 * (theirs_param - middle).norm()


def test_older_flat_files_load() -> None:
    optimizer = make(optim, "AdamW", 8, nn.Parameter(torch.randn(SHAPE)))
    run(optimizer, gradients(SHAPE, 3))
    saved = optimizer.state_dict()
    state = saved["state"][0]
    flat = {**saved, "state": {0: {"step": state["step"], **state[WRAPPER]}}}
    other = make(optim, "AdamW", 8, nn.Parameter(torch.randn(SHAPE)))
    other.load_state_dict(flat)
    assert_same_state(other.state_dict(), saved)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_file_loads_with_weights_only(bits: int) -> None:
    param = nn.Parameter(torch.randn(SHAPE))
    optimizer = make(optim, "AdEMAMix", bits, param)
    run(optimizer, gradients(SHAPE, 3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = make(optim, "AdEMAMix", bits, nn.Parameter(param.detach().clone()))
    other.load_state_dict(loaded)
    assert_same_state(other.state_dict(), optimizer.state_dict())


TORCH: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.8, "dampening": 0.1}),
    ("RMSprop", {"lr": 1e-3, "alpha": 0.9}),
    ("Adagrad", {"lr": 1e-2, "lr_decay": 0.1}),
]


@pytest.mark.parametrize(("family", "arguments"), TORCH, ids=lambda value: value if isinstance(value, str) else "")
def test_a_torch_run_goes_on_in_8_and_32_bits(family: str, arguments: dict[str, Any]) -> None:
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 12)
    param = nn.Parameter(start.clone())
    theirs = getattr(torch.optim, family)([param], **arguments)
    run(theirs, grads[:6])
    middle, saved = param.detach().clone(), copy.deepcopy(theirs.state_dict())
    want = run(theirs, grads[6:])
    moved = (param.detach() - middle).norm().item()
    momentum = {"momentum": 0.5} if family == "SGD" else {}
    for bits, error in ((32, 1e-5), (8, 0.05)):
        other = nn.Parameter(middle.clone())
        # Its own hyperparameters are replaced by the saved ones.
        ours = getattr(optim, f"{family}{bits}bit")([other], lr=1.0, min_8bit_size=0, **momentum)
        ours.load_state_dict(saved)
        assert ours.param_groups[0]["lr"] == arguments["lr"]
        got = run(ours, grads[6:])
        assert ((got - want) ** 2).sum() ** 0.5 < error * moved
        assert ours.state[other]["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)
        if family != "SGD":
            assert ours.state[other]["step"] == 12


def test_state_follows_the_optimizer_that_loads_it() -> None:
    grads = gradients(SHAPE, 4)
    params = {bits: nn.Parameter(torch.randn(SHAPE)) for bits in (8, 32)}
    optimizers = {bits: make(optim, "AdamW", bits, param) for bits, param in params.items()}
    for optimizer in optimizers.values():
        run(optimizer, grads)
    wide, narrow = (optimizers[bits].state_dict() for bits in (32, 8))
    optimizers[8].load_state_dict(wide)
    optimizers[32].load_state_dict(narrow)
    moments = optimizers[8].state[params[8]]
    assert moments["state1"].dtype == torch.uint8
    assert optimizers[32].state[params[32]]["state1"].dtype == torch.float32
    exact = wide["state"][0][WRAPPER]["state1"]
    decoded = torch.empty_like(exact).view(1, -1)
    decode_rows(moments["state1"].view(1, -1), moments["absmax1"].view(1, -1), decoded, signed=True)
    assert (decoded.view(SHAPE) - exact).abs().max() <= 0.01 * exact.abs().max()


@pytest.mark.parametrize("signed", [True, False])
def test_decoded_state_is_encoded_to_the_same_bits(signed: bool) -> None:
    """Also blocks whose element of largest magnitude is negative: the signed codebook has no -1."""
    values = torch.randn(3, 1000) ** 3
    values = values if signed else values.abs()
    values[0, :256] = -values[0, :256].abs() if signed else 0.0
    code = codebook(signed, torch.device("cpu"))
    codes, absmax = torch.empty(3, 1000, dtype=torch.uint8), torch.empty(3, 4)
    encode_rows(values, codes, absmax, signed)
    decoded = torch.empty(3, 1000)
    decode_rows(codes, absmax, decoded, signed)
    again, scale, twice = torch.empty_like(codes), torch.empty_like(absmax), torch.empty_like(decoded)
    encode_rows(decoded, again, scale, signed)
    decode_rows(again, scale, twice, signed)
    assert torch.equal(decoded, twice)
    assert torch.equal(absmax, scale)
    assert torch.equal(code[codes.int()], code[again.int()])
    # The first encoding was one: within half a step of the code.
    assert (decoded - values).abs().max() <= 0.05 * absmax.max()


def test_converted_averages_of_ademamix_have_blocks_of_their_own() -> None:
    """QC-OPT-020: the slow average's first block begins at its own first element, not in the fast one's last."""
    param = nn.Parameter(torch.randn(300))
    float32, coded = optim.AdEMAMix32bit([param]), optim.AdEMAMix8bit([nn.Parameter(torch.ones(300))], min_8bit_size=0)
    run(float32, gradients((300,), 2))
    coded.load_state_dict(float32.state_dict())
    averages = float32.state[param]["state1"].abs()
    scales = torch.stack([averages[:, :256].amax(1), averages[:, 256:].amax(1)], 1)
    (state,) = coded.state.values()
    assert torch.equal(state["absmax1"], scales)
    assert scales[0, 1] > 100 * scales[1, 0]  # one block for both would be seen


def test_a_second_moment_that_is_not_0_is_not_encoded_as_0() -> None:
    values = torch.tensor([[1.0, 1e-9, 0.0]])
    codes, absmax = torch.empty(1, 3, dtype=torch.uint8), torch.empty(1, 1)
    encode_rows(values, codes, absmax, signed=False)
    assert codes.tolist() == [[255, 1, 0]]


def broken(change: str) -> dict[str, Any]:
    optimizer = make(optim, "AdamW", 8, nn.Parameter(torch.randn(SHAPE)))
    run(optimizer, gradients(SHAPE, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][0]
    wrapped = state[WRAPPER]
    if change == "shape":
        wrapped["state2"] = wrapped["state2"][:-1]
    elif change == "blocksize":
        wrapped["absmax1"] = wrapped["absmax1"][:1]  # 2048, as bitsandbytes up to 0.43 wrote it
    elif change == "codebook":
        wrapped["qmap1"] = torch.linspace(-1, 1, 256)
    elif change == "dtype":
        wrapped["state1"] = wrapped["state1"].to(torch.int32)
    elif change == "mixed":
        wrapped["state2"] = wrapped["state2"].float()
    elif change == "no scales":
        del wrapped["absmax2"], wrapped["qmap2"]
    elif change == "no state":
        saved["state"][0] = {"step": 3, "momentum": torch.zeros(SHAPE)}
    elif change == "amsgrad":
        param = nn.Parameter(torch.randn(SHAPE))
        theirs = torch.optim.AdamW([param], amsgrad=True)
        run(theirs, gradients(SHAPE, 1))
        saved = theirs.state_dict()
    elif change == "groups":
        saved["param_groups"] *= 2
    elif change == "parameters":
        saved["param_groups"][0]["params"] = [0, 1]
    elif change == "lr":
        saved["param_groups"][0]["lr"] = -1.0
    elif change == "not one":
        saved = {"model": {}}
    return saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"state2 of parameter 0 has shape \(39, 32\), a parameter of shape \(40, 32\) needs \(40, 32\)"),
        ("blocksize", r"absmax1 of parameter 0 is torch.float32 of shape \(1,\), 1280 elements in blocks of 256 need"),
        ("codebook", "qmap1 of parameter 0 is not the dynamic codebook"),
        ("dtype", "state1 of parameter 0 is torch.int32, needs torch.uint8 or torch.float32"),
        ("mixed", "state1 and state2 of parameter 0 differ in dtype"),
        ("no scales", "parameter 0 has 8-bit state2 without absmax2 and qmap2"),
        ("no state", "parameter 0 has step, momentum; needs state1, or torch.optim's exp_avg and exp_avg_sq"),
        ("amsgrad", "parameter 0 also has max_exp_avg_sq, which this optimizer does not keep"),
        ("groups", "the state dict has 2 parameter groups, this optimizer 1"),
        ("parameters", "group 0 of the state dict has 2 parameters, this optimizer's 1"),
        ("lr", "lr is -1.0"),
        ("not one", "there is no state and no param_groups"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: str, message: str) -> None:
    param = nn.Parameter(torch.randn(SHAPE))
    optimizer = make(optim, "AdamW", 8, param)
    run(optimizer, gradients(SHAPE, 2))
    before, value = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(broken(change))
    assert isinstance(caught.value, FormatError) or change == "lr"
    assert_same_state(optimizer.state_dict(), before)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert torch.equal(param, value)


def test_names_of_parameters_are_kept() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    optimizer = optim.AdamW8bit(net.named_parameters())
    other = optim.AdamW8bit(net.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["0.weight", "0.bias"]


def test_a_resumed_run_is_the_whole_run() -> None:
    grads = gradients(SHAPE, 8)
    start = torch.randn(SHAPE)
    whole, part = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(make(optim, "AdEMAMix", 8, whole), grads)
    first = make(optim, "AdEMAMix", 8, part)
    run(first, grads[:4])
    second_part = nn.Parameter(part.detach().clone())
    second = make(optim, "AdEMAMix", 8, second_part)
    second.load_state_dict(first.state_dict())
    run(second, grads[4:])
    assert torch.equal(whole, second_part)
