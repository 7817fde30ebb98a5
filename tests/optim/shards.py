"""What the sharding tests run: ``shards.py FOLDER`` prints a line of JSON.

Two ranks train five steps, compare themselves with plain optimizers, write a checkpoint, read it into a second model
and train both on. One rank and four ranks read it and train on.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qcore import optim

STEPS = 5
KIND, OPTIONS = optim.AdamW8bit, {"lr": 1e-2, "weight_decay": 0.1}


def plain_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(130, 128), nn.Tanh(), nn.Linear(128, 1))


def sharded_model(ranks: int) -> nn.Module:
    model = plain_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(64, 130, generator=generator), torch.randn(64, 1, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> float:
    """Every rank has the same batch, so the averaged gradient is the plain one."""
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def weight(model: nn.Module) -> DTensor:
    parameter = model[0].weight  # type: ignore[index]
    assert isinstance(parameter, DTensor)
    return parameter


def decoded(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensor:
    """The whole first moment of the first weight."""
    state = optimizer.state_dict()["state"][0]["state1"]
    assert isinstance(state, DTensor)
    return state.full_tensor()


def trained(model: nn.Module, ranks: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    parameter = weight(model)
    shard = nn.Parameter(parameter.to_local().detach().clone())
    optimizer = KIND(model.parameters(), **OPTIONS)
    alone = KIND([shard], **OPTIONS)
    x, y = data()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        shard.grad = parameter.grad.to_local().clone()  # type: ignore[union-attr]
        optimizer.step()
        alone.step()
    state = optimizer.state[parameter]
    results = {
        "middle_loss": loss.item(),
        "step": state["step"],
        "state_dtypes": sorted({str(one["state1"].dtype) for one in optimizer.state.values()}),
        "state_shape": list(state["state1"].shape),
        "absmax": len(state["absmax1"]),
        "shard_is_plain_step": torch.equal(parameter.to_local(), shard),
    }
    wide, whole = sharded_model(ranks), plain_model()
    train(wide, optim.AdamW32bit(wide.parameters(), **OPTIONS))
    train(whole, optim.AdamW32bit(whole.parameters(), **OPTIONS))
    results["float_matches_unsharded"] = torch.allclose(
        weight(wide).full_tensor(),
        whole[0].weight,
        rtol=1e-4,
        atol=1e-5,  # type: ignore[index]
    )
    results["limited"] = {name: limited(ranks, name, shape, arguments) for name, shape, arguments in LIMITED}
    return optimizer, results


# Shards of whole blocks where states have 8 bits; uneven ones and an empty one where they have 32.
LIMITED: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("LAMB8bit", (128, 128), {"lr": 0.1, "weight_decay": 0.1}),
    ("LARS8bit", (128, 128), {"lr": 9.0, "momentum": 0.9, "weight_decay": 0.1}),
    ("LAMB32bit", (5, 70), {"lr": 0.1, "percentile_clipping": 50}),
    ("LARS32bit", (1, 300), {"lr": 9.0, "momentum": 0.9, "weight_decay": 0.1, "skip_zeros": True}),
]


def limited(ranks: int, name: str, shape: tuple[int, ...], arguments: dict[str, Any]) -> list[float]:
    """Three steps: the largest difference to the whole parameter's, and of that to a run without the limit."""
    generator = torch.Generator().manual_seed(9)
    rows = torch.linspace(0.01, 1.0, shape[0])[:, None]  # so that no shard's norms are half of the whole's
    start = torch.randn(shape, generator=generator) * rows
    grads = [torch.randn(shape, generator=generator) * (rows + 0.5) for _ in range(3)]
    for grad in grads:
        grad.view(-1)[::5] = 0.0
    mesh = init_device_mesh("cpu", (ranks,))
    param = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    whole, free = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    make = getattr(optim, name)
    optimizers = [make([param], **arguments), make([whole], **arguments), make([free], max_unorm=0.0, **arguments)]
    for grad in grads:
        param.grad, whole.grad, free.grad = distribute_tensor(grad, mesh, [Shard(0)]), grad, grad
        for optimizer in optimizers:
            optimizer.step()
    assert isinstance(param, DTensor)
    return [(param.full_tensor() - whole).abs().max().item(), (whole - free).abs().max().item()]


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / "checkpoint")
    moments = states["state"]["0.weight"]
    whole = decoded(optimizer, model)
    if dist.get_rank() == 0:
        torch.save(whole, folder / "moment.pt")
    return {"saved_types": [type(moments[key]).__name__ for key in ("state1", "state2")]}


def load(model: nn.Module, folder: Path) -> torch.optim.Optimizer:
    optimizer = KIND(model.parameters(), lr=1.0)
    weights, states = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": states}
    dcp.load(saved, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
    return optimizer


def moment_error(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> float:
    """Largest difference of the first moment to the saved one, over the largest value within 256 elements of it."""
    saved, now = torch.load(folder / "moment.pt").view(-1), decoded(optimizer, model).reshape(-1)
    nearby = nn.functional.max_pool1d(saved.abs()[None, None], 511, stride=1, padding=255).view(-1)
    return ((now - saved).abs() / nearby).max().item()


def work(rank: int, ranks: int, folder: Path, command: str, answers: Any) -> None:
    """What one rank does for a command; rank 0 answers."""
    meeting = folder / f"meeting-{command}-{ranks}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    results: dict[str, Any] = {}
    model = sharded_model(ranks)
    if command == "load":
        optimizer = load(model, folder)
        results["step"] = optimizer.state[weight(model)]["step"]
        results["moment_error"] = moment_error(optimizer, model, folder)
        results["final_loss"] = train(model, optimizer)
    else:
        optimizer, results = trained(model, ranks)
        results |= save(model, optimizer, folder)
        other = sharded_model(ranks)
        resumed = load(other, folder)
        results["final_loss"] = train(model, optimizer)
        train(other, resumed)
        results["resumed_is_exact"] = torch.equal(weight(model).to_local(), weight(other).to_local())
    if rank == 0:
        answers.put(results)
    dist.destroy_process_group()


def launch(ranks: int, folder: Path, command: str) -> dict[str, Any]:
    """Run a command on some ranks: forks, because a fresh interpreter spends seconds on imports."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=work, args=(rank, ranks, folder, command, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{command} on {ranks} ranks failed")
    result: dict[str, Any] = answers.get(timeout=60)
    return result


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    plan = {"two": (2, "train"), "one": (1, "load"), "four": (4, "load")}
    print(json.dumps({name: launch(ranks, folder, command) for name, (ranks, command) in plan.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
