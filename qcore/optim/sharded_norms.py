"""The limit of an update's norm where ranks share a parameter (QC-OPT-008).

A call of the backend sees one shard, and the limit is that of the whole parameter. So each rank first computes its
part of the update with the same op, on copies: a parameter of zeros, a step size of 1. The sums of squares of all
parameters are then added up over the ranks in one all-reduce, in float64, and each step is taken with the step size
that the limit leaves. It costs a second pass and, for one parameter at a time, its shard in float32 and its state once
more. Sums over shards are rounded in another order than those of QC-OPT-009: the step size may differ from the
unsharded one's in its last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcore.ops.optimizer import OptimizerRule, OptimizerTensors, optimizer_step
from qcore.optim.sharded import as_dtensor, is_split

if TYPE_CHECKING:
    from qcore.optim.batch import Call

_STATES = ("state1", "state2", "absmax1", "absmax2")


def limit_sharded(calls: Sequence[Call]) -> None:
    """Give the calls of a step whose parameter is sharded the step size that ``max_unorm`` leaves; all ranks together.

    Parameters
    ----------
    calls : sequence of Call
        Checked, not run. One with a limit on a sharded parameter has no other parameter.
    """
    limited = [call for call in calls if call.rule.max_unorm > 0 and is_split(call.batch.members[0].param)]
    # The order of the parameters, which is the same on every rank; that of the calls need not be.
    limited.sort(key=lambda call: call.batch.members[0].stream & 0xFFFFFFFF)
    by_ranks: dict[Any, list[Call]] = {}
    for call in limited:
        by_ranks.setdefault(_ranks(call.batch.members[0].param), []).append(call)
    for (mesh, dims), alike in by_ranks.items():
        sums = torch.stack([_squares(call) for call in alike])
        for dim in dims:
            torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
        for call, (update, param) in zip(alike, sums.tolist()):
            call.rule = replace(call.rule, max_unorm=0.0, step_size=_limited(call.rule, update, param))


def _ranks(param: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh, and its dimensions along which the parameter is split."""
    dtensor = as_dtensor(param)
    assert dtensor is not None
    mesh = dtensor.device_mesh
    return mesh, tuple(
        dim for dim, placement in enumerate(dtensor.placements) if not placement.is_replicate() and mesh.size(dim) > 1
    )


def _squares(call: Call) -> Tensor:
    """The sums of squares of this rank's update and parameter, float64."""
    rule, state, grad = call.rule, call.states[0], call.grads[0]
    param = call.batch.local_of(0).detach().float()
    if call.batch.compensated:  # QC-OPT-006
        param = param + state["kahan"].float()
    scales = tuple(call.scales)
    skipped = None
    if rule.l2 != 0.0:  # QC-OPT-003, since the copy of the parameter is not the parameter
        skipped = grad == 0 if rule.skip_zeros else None
        grad = grad.float() * (scales[0] if scales else 1.0) + param * rule.l2
        scales = ()
    update = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
    copies = {key: [state[key].clone()] for key in _STATES if key in state}
    optimizer_step(
        replace(
            rule,
            step_size=1.0,
            decay=1.0,
            l2=0.0,
            max_unorm=0.0,
            seed=0,
            stochastic=False,
            skip_zeros=rule.skip_zeros and skipped is None,
        ),
        OptimizerTensors([update], [grad], grad_scales=scales, **copies),
    )
    if skipped is not None:
        update.masked_fill_(skipped, 0.0)
    return torch.stack([update.double().square().sum(), param.double().square().sum()])


def _limited(rule: OptimizerRule, update: float, param: float) -> float:
    """The step size of QC-OPT-008 from the two sums."""
    limit, norm = rule.max_unorm * math.sqrt(param), math.sqrt(update) * rule.unorm_factor
    if param == 0.0 or not norm > limit:
        return rule.step_size
    step_size, ratio = torch.tensor([rule.step_size, limit / norm], dtype=torch.float64).float()
    return float(step_size * ratio)
