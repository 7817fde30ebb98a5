"""Which backend is chosen: a wrong choice is refused in words, and a broken third party's spoils nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from types import MappingProxyType

import pytest
import torch

from qcore.backend import Backend, Description, registry
from qcore.backend.registry import VARIABLE, backend_for, backend_report, get_backend, use_backend
from qcore.cli.info import collect
from qcore.errors import BackendNotFound, BackendUnavailable, InvalidArgument


class Sound(Backend):
    name = "sound"
    device_types = frozenset({"cpu"})

    def describe(self, device: torch.device) -> Description:
        odd = {"gemm_4bit": MappingProxyType({"lanes": {1, 2}, "of": object})}
        return Description("sound", "0", {}, "a device", "", "", declarations=odd)


class Raises(Sound):
    def describe(self, device: torch.device) -> Description:
        raise RuntimeError("the driver is too old")


class ServesNothing(Sound):
    device_types = frozenset()


class SaysNothing(Sound):
    def describe(self, device: torch.device) -> Description:
        return None  # type: ignore[return-value]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Entry points beside those that are installed."""
    real = registry.entry_points

    def install(**classes: str) -> None:
        added = [EntryPoint(name, f"{__name__}:{kind}", registry.GROUP) for name, kind in classes.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), *added])
        registry.reset()

    yield install
    monkeypatch.undo()
    registry.reset()


@pytest.mark.parametrize("text", ["cup=cpu_reference", "cpu=cpu_reference,gpu=cpu"])
def test_a_device_type_that_torch_does_not_have_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="is no device type of torch"), use_backend(text):
        pass
    monkeypatch.setenv(VARIABLE, text)
    registry.reset()
    try:
        with pytest.raises(InvalidArgument, match=VARIABLE):
            backend_for("cpu")
    finally:
        monkeypatch.undo()
        registry.reset()


def test_a_device_type_of_torch_is_taken() -> None:
    with use_backend("cpu=cpu_reference,meta=cpu_reference"):
        assert backend_for("cpu").name == "cpu_reference"


@pytest.mark.parametrize("choice", ["", " , ", None, 3, Sound], ids=repr)
def test_a_choice_of_nothing_is_refused(choice: object) -> None:
    with pytest.raises(InvalidArgument, match="use_backend: "), use_backend(choice):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("name", [":x", "json:nosuch", "nosuch.module:x"])
def test_an_attribute_that_is_not_there_is_not_found(name: str) -> None:
    with pytest.raises(BackendNotFound, match="Available: "):
        get_backend(name)


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    registry.reset()
    try:
        assert backend_for("cpu").name in ("cpu", "cpu_reference")
    finally:
        registry.reset()


def test_a_broken_backend_is_reported_and_spoils_no_other(installed: Callable[..., None]) -> None:
    installed(acme="Raises", bolt="ServesNothing", crux="SaysNothing", dune="Sound")
    report = backend_report()
    assert "RuntimeError: the driver is too old" in report["acme"].reason
    assert "device_types is empty" in report["bolt"].reason
    assert "describe() gave a NoneType" in report["crux"].reason
    assert [report[name].available for name in ("acme", "bolt", "crux", "dune")] == [False, False, False, True]
    with pytest.raises(BackendNotFound, match="the driver is too old"):
        get_backend("nosuch")
    told = json.loads(json.dumps(collect()))["backends"]["dune"]["description"]["declarations"]
    assert told["gemm_4bit"]["lanes"] == ["1", "2"]


def test_one_name_for_two_backends_is_refused(installed: Callable[..., None]) -> None:
    installed(cpu_reference="Sound", dune="Sound")
    with pytest.raises(BackendUnavailable, match=r"2 installed packages .*cpu_reference:load.* and .*:Sound"):
        get_backend("cpu_reference")
    status = backend_report()["cpu_reference"]
    assert not status.available
    assert "qcore_cpu_reference:load" in status.origin
    assert get_backend("dune").name == "sound"
