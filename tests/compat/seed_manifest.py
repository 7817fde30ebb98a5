"""What each code block of the seed documents needs to run on qcore.

The documents are guides that others wrote for bitsandbytes and its neighbours; they are not part of this repository.
``QCORE_SEEDS`` names the folder that holds them. A document is known by its SHA-256, a block by its place in it. The
blocks of a document share their names, in order, as a reader would run them.

Everywhere: a hub model stands for a local tiny one, ``push_to_hub`` for saving into a local folder, and ``cuda`` for
the device at hand. What else a block needs is listed here, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Snippet:
    """One Python block.

    Attributes
    ----------
    index : int
        Its place among all blocks of the document, from 0.
    setup : str
        Names that the document leaves open, made before the block runs.
    replace : tuple of pairs
        Text to replace before the block runs: what is no Python, or gone from another library.
    check : str
        Expression that has to be true afterwards.
    lines : str
        For a document that lost its line ends: where each line starts, ``+`` its indentation.
    """

    index: int
    setup: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    check: str = "True"
    lines: str = ""


_MODEL = "model = AutoModelForCausalLM.from_pretrained(LLAMA)"
_AUTO = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"
_DATA = (
    "rows = [{'input_ids': [3, 4, 5, 6], 'attention_mask': [1] * 4, 'labels': [3, 4, 5, 6]}] * 8\ntrain_dataset = rows"
)
_TRAINER = f"from transformers import Trainer, TrainingArguments, default_data_collator as data_collator\n{_DATA}"
_NAMES_8BIT = "any(type(m).__name__ == 'Linear8bitLt' for m in {}.modules())"
_NAMES_4BIT = "any(type(m).__name__ == 'Linear4bit' for m in {}.modules())"
_NAMES_INT4 = "sum(type(m).__name__ == 'LinearInt4' for m in {}.modules()) == 3 * 7"

# Questions to a GPU's runtime, where there is no GPU.
WITHOUT_GPU = (
    ("torch.cuda.current_device()", "'none'"),
    ("torch.cuda.get_device_name()", "'none'"),
    ("torch.cuda.cudart().cudaProfilerStart()", "pass"),
    ("torch.cuda.cudart().cudaProfilerStop()", "pass"),
    ("fp16=True", "use_cpu=True"),
    ('{0: "20GB", "cpu": "30GB"}', '{"cpu": "30GB"}'),
    ('device_map={"": 0}', 'device_map={"": DEVICE}'),
)

_GUIDE = (
    Snippet(2, check="isinstance(bnb.CUDA_AVAILABLE, bool)"),
    Snippet(3, check="int8_linear.weight.has_fp16_weights is False"),
    Snippet(4, check=_NAMES_8BIT.format("model")),
    Snippet(5, check="int4_linear.weight.compress_statistics"),
    Snippet(6, check="(nf4_linear.weight.quant_type, fp4_linear.weight.quant_type) == ('nf4', 'fp4')"),
    Snippet(7, check="type(optimizer).__name__ == 'Adam8bit'"),
    Snippet(8, check="output.shape == (32, 768) and bool(torch.isfinite(output).all())"),
    Snippet(9, check="QuantizedMLP(8, 16, 8)(torch.randn(2, 8)).shape == (2, 8)"),
    Snippet(
        10,
        setup=(
            "criterion = torch.nn.functional.mse_loss\n"
            "dataloader = [(torch.randn(4, 768), torch.zeros(4, 768)) for _ in range(2)]"
        ),
        check="bool(torch.isfinite(loss)) and len(optimizer.state) > 0",
    ),
    Snippet(11, check=_NAMES_8BIT.format("model")),
    Snippet(12, check=_NAMES_4BIT.format("model")),
    Snippet(
        13,
        setup=f"{_TRAINER}\ntraining_args = TrainingArguments('out', max_steps=2, report_to=[], use_cpu=not GPU)",
        check="trainer.state.global_step == 2",
    ),
    Snippet(14, setup="inputs = torch.arange(3, 11).view(1, 8).to(DEVICE)", check="output.logits.shape[:2] == (1, 8)"),
    Snippet(
        15,
        # The document's own slip of the keyboard is an alias in qcore.
        check="bnb.optim.GlobalOptimManager.get_instance() is bnb.optim.GlobalOptimManager.get_inuserce()",
    ),
    Snippet(
        16,
        setup=(
            "model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))\nold = model[0].weight.clone()"
        ),
        check="torch.equal(model[0].weight, old) and type(state_dict['0.weight']).__name__ == 'Int8Params'",
    ),
    Snippet(
        17,
        setup="input, weight, bias = torch.randn(5, 64), torch.randn(32, 64), torch.randn(32)",
        check="(output - torch.nn.functional.linear(input, weight, bias)).abs().max() < 0.6",
    ),
    Snippet(
        18,
        setup="tensor = torch.randn(6, 40)",
        check="(quantized_tensor - tensor).abs().max() <= tensor.abs().max() / 253",
    ),
)

_LOADS_AGAIN = (
    "torch.equal(AutoModelForCausalLM.from_pretrained('{}')(ids).logits, quantized_model(ids).logits) and "
    + _NAMES_INT4.format("quantized_model")
)
_SMALL_GROUPS = (('"q_group_size": 128', '"q_group_size": 8'),)  # the tiny model's 72 inputs have no groups of 128
_AUTO_GPTQ = (("from auto_gptq import", "from qcore.compat.auto_gptq import"),)
_IDS = "import torch\nids = torch.arange(3, 11).view(1, 8).to(DEVICE)"

# "c4" is the data set of that name, cut down, in the cache folder of the hub that the blocks run with.
_ROCM_GUIDE = (
    Snippet(3, replace=_AUTO_GPTQ, check="set(examples[0]) >= {'input_ids', 'attention_mask'}"),
    Snippet(4, check="quantize_config.bits == 4 and not quantize_config.desc_act"),
    Snippet(
        5,
        replace=_AUTO_GPTQ,
        check=_NAMES_INT4.format("base_model") + " and Path(quantized_model_name, 'quantize_config.json').is_file()",
    ),
    Snippet(6, check="gptq_config.bits == 4"),
    Snippet(7, setup=_IDS, check=_NAMES_INT4.format("quantized_model")),
    Snippet(8, check=_LOADS_AGAIN.format("hub/llama-2-7b-hf-gptq")),
    Snippet(9, check=_LOADS_AGAIN.format("llama-2-7b-gptq")),
    Snippet(
        10,
        # The document's own name is that of the float model, which cannot be quantized without a data set.
        replace=(("base_model_name,", "'llama-2-7b-gptq',"),),
        check=_NAMES_INT4.format("quantized_model"),
    ),
    Snippet(13, replace=(("from awq import", "from qcore.compat.awq import"), *_SMALL_GROUPS)),
    Snippet(14, check=_NAMES_INT4.format("base_model") + " and Path(quantized_model_name, 'config.json').is_file()"),
    Snippet(15, check=_NAMES_INT4.format("model") + " and bool(torch.isfinite(model(ids).logits).all())"),
    Snippet(
        16,
        replace=(('device_map="auto"', 'device_map="auto")'),),  # the document forgot to close it
        check="torch.equal(quantized_model(ids).logits, model(ids).logits)",
    ),
    Snippet(
        19,
        setup=(
            "import torch\nmodel = torch.nn.Linear(64, 32)\nactivations = torch.randn(5, 64)\nactivations[0, 3] = 50.0"
        ),
        replace=(("bnb.matmul(...", "product = bnb.matmul(activations, model.weight"),),
        check="(product - activations @ model.weight.T).abs().max() < 0.2 and type(adam).__name__ == 'Adam8bit'",
    ),
    Snippet(20, check=_NAMES_4BIT.format("bnb_model_4bit")),
    Snippet(
        21,
        replace=(("model.generate", "bnb_model_8bit.generate"),),  # the document's model has another name here
        check="len(outputs) == 1",
    ),
)

_HUGGING_FACE_GUIDE = (
    Snippet(1, check=_NAMES_8BIT.format("model_8bit")),
    Snippet(2, check=_NAMES_8BIT.format("model")),
    Snippet(3, check=_NAMES_8BIT.format("model")),
    Snippet(4, check="quantization_config.llm_int8_enable_fp32_cpu_offload"),
    Snippet(5, replace=((": 0,", ": DEVICE,"),), check="device_map['lm_head'] == 'cpu'"),
    Snippet(6, check="model_8bit.lm_head.weight.dtype.is_floating_point"),
    Snippet(7, check="type(model_8bit.lm_head).__name__ == 'Linear'"),
)

# This document lost its line ends.
_SKILL = (
    Snippet(1, check=_NAMES_8BIT.format("model"), lines="0 66 113 235"),
    Snippet(2, setup=_AUTO, check=_NAMES_4BIT.format("model"), lines="0 87 209"),
    Snippet(5, check="config.load_in_8bit and config.llm_int8_threshold == 6.0", lines="0 44 57 149"),
    Snippet(6, check="config.bnb_4bit_use_double_quant", lines="0 104 160 213"),
    Snippet(7, check="outputs.shape[0] == 1", lines="0 61 212 240 311 328 402 452 488 503 516"),
    Snippet(10, check=_NAMES_4BIT.format("model"), lines="0 66 79 229"),
    Snippet(
        11,
        check="sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 16 * 2 * (144 + 96)",
        lines="0 77 106 153 170 214 242 355 375 418 453",
    ),
    Snippet(
        12,
        setup=_DATA,
        replace=(("tokenizer=tokenizer", "processing_class=tokenizer"),),  # transformers 5's name
        check="trainer.state.epoch == 3.0 and Path('qlora-adapters/adapter_model.safetensors').is_file()",
        lines="0 52 271 374 390 424",
    ),
    Snippet(
        14,
        setup=_DATA,
        check="'AdamW' in type(trainer.optimizer.optimizer).__name__ and trainer.state.epoch == 3.0",
        lines="0 27 79 110 169 302 323 405",
    ),
    Snippet(
        15,
        setup=f"{_DATA}\ndataloader = [{{k: torch.tensor([v]) for k, v in row.items()}} for row in rows[:2]]",
        check="len(optimizer.state) > 0",
        lines="0 27 120 136 161+4 188+4 204+4 221+4",
    ),
    Snippet(17, check="after >= 0", lines="0 13 52 68 85 123"),
    Snippet(19, check=_NAMES_4BIT.format("model"), lines="0 162"),
    Snippet(20, check="config.load_in_8bit", lines="0 47"),
    Snippet(21, check="config.bnb_4bit_quant_type == 'nf4'", lines="0 93 141"),
    Snippet(22, check=_NAMES_4BIT.format("model"), lines="0 148"),
)

_FP4_LIBRARY = (("from torch_bnb_fp4 import", "from qcore.compat.torch_bnb_fp4 import"),)

_FP4_GUIDE = (
    Snippet(
        5,
        setup="import torch",
        replace=_FP4_LIBRARY,
        check="output.shape == (10, 1024) and output.dtype == torch.float16",
    ),
    Snippet(
        6,
        replace=_FP4_LIBRARY,
        check="sum(type(m).__name__ == 'TorchFP4Linear' for m in model.modules()) == 3 * 7",
    ),
)

# SHA-256 of the document -> (what it is, its Python blocks)
DOCUMENTS = {
    "43d2e52e3f01789e84e63a9e1a936dba0042d255d1e48a440513539b8b600dbc": ("guide for AMD GPUs", _GUIDE),
    "ec46e753260c9bd3b44724d7cbae49d8660a9f837874f1edcc78e3a1903a653f": ("ROCm's quantization guide", _ROCM_GUIDE),
    "1ba3954f2f4b42866fb88542ee2139cc1fda976cce9d466cf99fc71a21c95dec": ("Hugging Face guide", _HUGGING_FACE_GUIDE),
    "85cae30abac33d8bc1534325587fc2a9ca688ff22c44acbd6787658acf6e05c0": ("how-to for LLMs", _SKILL),
    "3804fb481c009f630ebb953d4fd9c957d3ed2bdbda4c8566bb6d0746fe910e8c": ("torch-bnb-fp4's README", _FP4_GUIDE),
}
