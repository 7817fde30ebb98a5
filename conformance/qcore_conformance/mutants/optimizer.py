"""Mutants of ``optimizer_step``: the mistakes of those who wrote such kernels before, and a few more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qcore.backend import OptimizerRule, OptimizerTensors
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import Steps

_OP = "optimizer_step"
_CHANGED = ("params", "state1", "state2", "absmax1", "absmax2", "compensation")


class Optimizer(Steps):
    """The reference with a hook before the step and one after it."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return rule

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        return t

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        """``before`` holds copies."""

    def optimizer_step(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        copies = {name: [part.clone() for part in getattr(tensors, name)] for name in _CHANGED}
        self.reference.optimizer_step(self.rule(rule), self.tensors(rule, tensors))
        self.after(rule, tensors, replace(tensors, **copies))


@mutant("QC-OPT-004", _OP)
class DecayIgnored(Optimizer):
    """Decoupled weight decay is left out."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, decay=1.0)


@mutant("QC-OPT-004", _OP)
class DecayAfterUpdate(Optimizer):
    """The parameter shrinks after the update, with a rounding in between."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, decay=1.0)

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        for param in t.params:
            param.copy_(param.float() * float(np.float32(rule.decay)))


@mutant("QC-OPT-003", _OP)
class CoupledDecayIgnored(Optimizer):
    """The weight decay of the gradient is left out."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, l2=0.0)


@mutant("QC-OPT-003", _OP)
class CoupledDecayDecoupled(Optimizer):
    """The weight decay of the gradient shrinks the parameter instead."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, l2=0.0, decay=rule.decay + rule.step_size * rule.l2)


@mutant("QC-OPT-003", _OP)
class GradScaleIgnored(Optimizer):
    """The factors of the gradients are left out."""

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        return replace(t, grad_scales=())


@mutant("QC-OPT-003", _OP)
class GradScaleOfTheFirst(Optimizer):
    """Every gradient takes the factor of the first tensor."""

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        return replace(t, grad_scales=list(t.grad_scales[:1]) * len(t.grad_scales))


@mutant("QC-NUM-002", _OP)
class GradientThroughHalf(Optimizer):
    """Gradients pass through float16."""

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        return replace(t, grads=[grad.half().to(grad.dtype) for grad in t.grads])


@mutant("QC-OPT-001", _OP)
class LastTensorForgotten(Optimizer):
    """The last tensor of a call takes no step."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        for name in _CHANGED:
            for now, then in list(zip(getattr(t, name), getattr(before, name), strict=True))[-1:]:
                now.copy_(then)


@mutant("QC-OPT-001", _OP)
class OneTensorTooMany(Optimizer):
    """More than sixteen tensors do not fit into a launch, and the rest is dropped."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        for now, then in list(zip(t.params, before.params, strict=True))[16:]:
            now.copy_(then)


@mutant("QC-OPT-002", _OP)
class GainInFloat32(Optimizer):
    """1 - beta is computed from the rounded beta, in float32."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        one = np.float32(1)
        return replace(rule, gain1=float(one - np.float32(rule.beta1)), gain2=float(one - np.float32(rule.beta2)))


@mutant("QC-OPT-002", _OP)
class StepSizeTruncated(Optimizer):
    """The step size is cut off after 20 bits instead of rounded to 24."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        bits = np.float32(rule.step_size).view(np.uint32) & np.uint32(0xFFFFFFF0)
        return replace(rule, step_size=float(bits.view(np.float32)))


@mutant("QC-OPT-010", _OP)
class EpsilonIgnored(Optimizer):
    """Nothing is added to the root."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, eps=0.0)


@mutant("QC-OPT-010", _OP)
class SecondMomentNotStored(Optimizer):
    """The second state stays what it was."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        for now, then in zip(t.state2, before.state2, strict=True):
            now.copy_(then)


@mutant("QC-OPT-011", _OP)
class SlowAverageIsFast(Optimizer):
    """Both averages take the factor of the fast one."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, beta3=rule.beta1, gain3=rule.gain1)


@mutant("QC-OPT-011", _OP)
class AlphaIgnored(Optimizer):
    """The slow average has no weight."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, alpha=0.0)


@mutant("QC-OPT-011", _OP)
class CorrectionIgnored(Optimizer):
    """AdEMAMix without the correction of the second moment."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, correction2=1.0)


@mutant("QC-OPT-012", _OP)
class LionFactorsSwapped(Optimizer):
    """Lion takes beta2 for the direction and beta1 for the average."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        if rule.algorithm != "lion":
            return rule
        return replace(rule, beta1=rule.beta2, gain1=rule.gain2, beta2=rule.beta1, gain2=rule.gain1)


@mutant("QC-OPT-013", _OP)
class NesterovIgnored(Optimizer):
    """Momentum without looking ahead."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, nesterov=False)


@mutant("QC-OPT-005", _OP)
class SkipZerosIgnored(Optimizer):
    """Elements without a gradient take their step all the same."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, skip_zeros=False)


@mutant("QC-OPT-005", _OP)
class SkipZerosDecays(Optimizer):
    """Skipped elements still shrink."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        if rule.skip_zeros:
            for param, grad, then in zip(t.params, t.grads, before.params, strict=True):
                shrunk = (then.float() * float(np.float32(rule.decay))).to(param.dtype)
                param.copy_(torch.where(grad.reshape(param.shape) == 0, shrunk, param))


@mutant("QC-OPT-006", _OP)
class CompensationForgotten(Optimizer):
    """What rounding cut off is not kept."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        for compensation in t.compensation:
            compensation.zero_()


@mutant("QC-OPT-006", _OP)
class CompensationUnread(Optimizer):
    """The compensation is written but never added."""

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        for compensation in t.compensation:
            compensation.zero_()
        return t


@mutant("QC-OPT-007", _OP)
class StochasticIgnored(Optimizer):
    """Parameters are rounded to nearest."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, stochastic=False)


@mutant("QC-OPT-007", _OP)
class SeedWithoutStep(Optimizer):
    """The upper half of the seed, which holds the step, is dropped: every step rounds alike."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, seed=rule.seed & 0xFFFFFFFF)


@mutant("QC-OPT-007", _OP)
class StreamIgnored(Optimizer):
    """Every tensor draws the same random numbers."""

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        return replace(t, streams=[0] * len(t.streams))


@mutant("QC-OPT-008", _OP)
class LimitIgnored(Optimizer):
    """max_unorm has no effect, as in 8-bit LAMB elsewhere."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, max_unorm=0.0)


@mutant("QC-OPT-008", _OP)
class LimitWithoutFactor(Optimizer):
    """The norm is that of the update before its bias correction."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, unorm_factor=1.0)


@mutant("QC-OPT-008", _OP)
class LimitStopsZeros(Optimizer):
    """A parameter that is all zeros never moves."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        if rule.max_unorm:
            for param, then in zip(t.params, before.params, strict=True):
                if not then.any():
                    param.copy_(then)


@mutant("QC-OPT-009", _OP)
class LimitOneUlpOff(Optimizer):
    """The limit is one float32 ulp too large, as sums in another order or in float32 leave it."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, max_unorm=float(np.nextafter(np.float32(rule.max_unorm), np.float32(1e9))))


@mutant("QC-OPT-020", _OP)
class SecondRowOverlaps(Optimizer):
    """The absmax of AdEMAMix's slow average begins in the last block of the fast one if that is a tail."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        if rule.algorithm == "ademamix" and rule.state_bits == 8:
            for param, absmax in zip(t.params, t.absmax1, strict=True):
                if param.numel() % 256:
                    rows = absmax.view(2, -1)
                    rows[0, -1] = rows[1, 0]


@mutant("QC-OPT-020", _OP)
class SignedStateUnsigned(Optimizer):
    """A state in the signed codebook is read and written as an unsigned one."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, signed_state=False)


@mutant("QC-OPT-020", _OP)
class SquaresAlwaysSigned(Optimizer):
    """RMSprop and Adagrad keep their squares in the signed codebook, whatever they are told."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, signed_state=rule.state_bits == 8 and rule.algorithm in ("rmsprop", "adagrad"))


@mutant("QC-OPT-021", _OP)
class SecondMomentVanishes(Optimizer):
    """Second moments may take the code of 0, and small negative first moments may not."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, bnb_codes=True)


@mutant("QC-OPT-021", _OP)
class TailKeepsItsScale(Optimizer):
    """The absmax of a tail block is not renewed."""

    def after(self, rule: OptimizerRule, t: OptimizerTensors, before: OptimizerTensors) -> None:
        for param, now, then in zip(t.params if t.absmax1 else (), t.absmax1, before.absmax1, strict=True):
            if param.numel() % 256:
                now[-1:] = then[-1:]


@mutant("QC-OPT-023", _OP)
class BnbCodesIgnored(Optimizer):
    """The flag that asks for bitsandbytes' codes has no effect."""

    def rule(self, rule: OptimizerRule) -> OptimizerRule:
        return replace(rule, bnb_codes=False)


@mutant("QC-OPT-022", _OP)
class NanTakenForZero(Optimizer):
    """A gradient that is NaN counts as 0, so that its state and its parameter go on."""

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        return replace(t, grads=[torch.where(grad.isnan(), torch.zeros_like(grad), grad) for grad in t.grads])


@mutant("QC-OPT-022", _OP)
class InfinityClamped(Optimizer):
    """An infinite gradient counts as the largest finite one."""

    def tensors(self, rule: OptimizerRule, t: OptimizerTensors) -> OptimizerTensors:
        return replace(t, grads=[_clamped(grad) for grad in t.grads])


def _clamped(grad: Tensor) -> Tensor:
    top = torch.finfo(grad.dtype).max
    return torch.where(grad.isinf(), grad.sign() * top, grad)
