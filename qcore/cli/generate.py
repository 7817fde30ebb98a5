"""``qcore generate``."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch

from qcore.backend.registry import use_backend
from qcore.cli.console import quiet_transformers
from qcore.cli.tokenizer import load_tokenizer
from qcore.errors import InvalidArgument
from qcore.formats.plan import FLOATS
from qcore.integrations.checkpoint import load_model


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to answer or go on with; - reads it from the standard input.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0.0), default=0.0, show_default=True, help="0: the likeliest token."
)
@click.option("--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, help="Of the random draws; without it each run differs.")
@click.option(
    "--chat/--no-chat", default=None, help="Put the prompt into the chat template; by default where there is one."
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["auto", *FLOATS]),
    default="auto",
    show_default=True,
    help="To compute in; auto: the checkpoint's own.",
)
@click.option("--backend", metavar="SPEC", help="Backend to compute with, as QCORE_BACKEND.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
def command(
    model: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    chat: bool | None,
    compute_dtype: str,
    backend: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Generate text from the checkpoint in folder MODEL, quantized or not; tokens appear as they are made."""
    check_device(device)
    quiet_transformers()
    if threads is not None:
        torch.set_num_threads(threads)
    if seed is not None:
        torch.manual_seed(seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    with nullcontext() if backend is None else use_backend(backend):
        tokenizer = load_tokenizer(model)
        inputs = chat_inputs(tokenizer, text, chat)
        began = time.monotonic()
        network = load_model(model, dtype=None if compute_dtype == "auto" else FLOATS[compute_dtype], device=device)
        loaded = time.monotonic() - began
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
        streamer = stream(network, tokenizer, inputs.to(device), max_new_tokens, sampling)
    click.echo(f"loaded in {loaded:.1f} s; {streamer.summary(inputs.shape[1])}", err=True)


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here, before anything is loaded onto it.

    Raises
    ------
    InvalidArgument
        Its name is unknown, torch was built without it, it is not there, or it holds no values (meta).
    """
    try:
        kind = torch.empty(1, device=device).device.type
    except Exception as error:  # an AssertionError where torch was built without the device
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidArgument(f"--device {device}: torch cannot use it here: {reason}") from error
    if kind == "meta":
        raise InvalidArgument("--device meta: holds no values, so there is nothing to generate from")


def chat_inputs(tokenizer: Any, text: str, chat: bool | None = None) -> torch.Tensor:
    """Tokens of ``text``, int64 ``(1, tokens)``; in the chat template if ``chat``, or if None and there is one.

    Raises
    ------
    InvalidArgument
        There is no template, or nothing in the text.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise InvalidArgument("--chat: the tokenizer has no chat template; pass --no-chat")
    if template and chat is not False:
        messages = [{"role": "user", "content": text}]
        made = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = made["input_ids"]
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise InvalidArgument("--prompt: is empty, and the tokenizer adds nothing to it")
    return ids


class TimedStreamer:
    """Writes text as tokens come, and takes the times: the prompt's, and each token's.

    Transformers calls :meth:`put` with the prompt first, then with one token after the other.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers import TextStreamer

        self._text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._began = time.perf_counter()
        self._times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._times.append(time.perf_counter())
        self._prompt_seen = True
        self._text.put(value)

    def end(self) -> None:
        self._text.end()

    @property
    def tokens(self) -> int:
        return len(self._times)

    @property
    def prompt_seconds(self) -> float:
        """Until the first token."""
        return self._times[0] - self._began if self._times else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first one."""
        if self.tokens < 2:
            return 0.0
        return (self.tokens - 1) / (self._times[-1] - self._times[0])

    def summary(self, prompt_tokens: int) -> str:
        """One line of figures."""
        prompt = f"prompt {prompt_tokens} tokens in {self.prompt_seconds:.2f} s"
        return f"{prompt}; {self.tokens} new tokens, {self.decode_rate:.1f} tokens/s"


def stream(
    model: Any, tokenizer: Any, inputs: torch.Tensor, max_new_tokens: int, sampling: dict[str, Any]
) -> TimedStreamer:
    """Generate from ``inputs`` (int64, ``(1, tokens)``) onto stdout; greedy unless ``sampling`` says otherwise."""
    streamer = TimedStreamer(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **(sampling or {"do_sample": False}),
        )
    return streamer
