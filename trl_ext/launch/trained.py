"""What is done with a saved adapter: it is merged into its base, it scores a file of answers, or one talks to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from trl_ext.feedback.files import Unusable
from trl_ext.launch.judging import scores_of
from trl_ext.ppo.building import args_of_gpu
from trl_ext.reward_models.rows import answer_ids
from trl_ext.roles import SharedBase, adapters
from trl_ext.roles.assembly import load_causal_lm
from trl_ext.tokens import eos_ids
from trl_ext.types import fault_of_messages

# Nats between a model with its adapter and the merged one: what rounding explains.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def merge(folder: str | Path, output_dir: str | Path, base: str | None = None, dtype: str = "auto") -> float:
    """Write the base with a saved adapter merged into it, and the tokenizer: a plain model that Transformers, vLLM and
    llama.cpp's converter read. A reward adapter gives a sequence classifier.

    The merged model is compared with the adapter on its base before anything is written: PEFT merges some
    architectures into another function.

    Args:
        folder: of the adapter.
        output_dir: where the model goes.
        base: name or folder of the base; None: the one that the adapter names.
        dtype: of the weights, as in `from_pretrained`.

    Returns:
        The largest difference on random tokens, nats (of a reward adapter: of the score).

    Raises:
        FileNotFoundError, ValueError: there is no adapter in `folder`, `output_dir` is in use, or the merged model is
            another function.
    """
    adapter, output = _on_its_base(folder, base), Path(output_dir)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"The folder {str(output)!r} is not empty: name another one for the merged model.")
    scored = adapter.start is None
    load = AutoModelForSequenceClassification.from_pretrained if scored else load_causal_lm
    if adapters.trained_over_quantized(Path(folder)):
        warnings.warn(
            f"The adapter in {str(folder)!r} was trained over a quantised base, and it is merged into one that is not: "
            "the merged model's answers shift a little.",
            UserWarning,
            stacklevel=2,
        )
    if not scored and (Path(folder) / adapters.HEAD).is_file():
        warnings.warn(
            f"The head {str(Path(folder) / adapters.HEAD)!r} is left out: a language model has no place for it.",
            UserWarning,
            stacklevel=2,
        )
    plain = load(
        adapter.base, dtype=dtype, revision=adapter.revision or "main", **({"num_labels": 1} if scored else {})
    )
    config = plain.config.get_text_config()
    if scored and config.pad_token_id is None:  # else the classifier scores no two answers at a time
        tokenizer = _tokenizer(adapter)
        known = adapters.read_pad_token_id(Path(folder), tokenizer.pad_token_id)
        config.pad_token_id = tokenizer.eos_token_id if known is None else known
    model = PeftModel.from_pretrained(plain, str(folder)).eval()
    before = _outputs(model, scored)
    merged = model.merge_and_unload(safe_merge=True)
    difference = float((_outputs(merged, scored) - before).abs().max())
    if not difference <= TOLERANCE.get(merged.dtype, TOLERANCE[torch.bfloat16]):
        raise ValueError(
            f"Merged into {type(plain).__name__}, the adapter in {str(folder)!r} is another function "
            f"({difference:.2g} nats apart): PEFT does not merge it right there. Use base and adapter side by side."
        )
    tokenizer = _tokenizer_of(adapter, merged)
    if not scored:  # answers end where they did in training
        merged.generation_config.eos_token_id = eos_ids(merged, tokenizer) or None
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return difference


def score(
    folder: str | Path,
    rows: Dataset,
    base: str | None = None,
    load_in_4bit: bool = False,
    batch_size: int = 32,
    dtype: str | None = None,
) -> list[float]:
    """Each row's score by a saved reward adapter, read as TRL's RewardTrainer reads it.

    Args:
        folder: that RewardTrainer, `recipes/reward_lora.py` or LLaMA-Factory wrote.
        rows: with a column "completion" and, where answers have one, "prompt"; texts or conversations. Of these "tools"
            and "chat_template_kwargs" are read, too.
        base: name or folder of the base; None: the one that the adapter names.
        load_in_4bit: hold the base in NF4, as it was for the training.
        batch_size: answers in one forward.
        dtype: of the base, as in `SharedBase.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: there is no adapter in `folder`, or a row has no completion.
    """
    adapter = _on_its_base(folder, base)
    if "completion" not in rows.column_names:
        raise ValueError(
            f"The rows have no column 'completion', but {', '.join(rows.column_names)}: rename one, as in "
            "--column text=completion."
        )
    if not len(rows):
        raise ValueError("There are no rows to score.")
    tokenizer, sequences = _tokenizer(adapter), list[list[int]]()
    for number, row in enumerate(rows):
        completion = row["completion"]
        fault = fault_of_messages(completion) if isinstance(completion, list) else "no text or conversation"
        if fault and not (isinstance(completion, str) and completion):
            raise ValueError(f"Row {number}, column 'completion': {completion!r:.60} is {fault}.")
        try:
            sequences.append(answer_ids(tokenizer, row, completion))
        except Unusable as bad:
            raise ValueError(f"Row {number}, column {bad.column!r}: {bad.reason}.") from bad
    how = loading(load_in_4bit, dtype) | {"revision": adapter.revision or "main"}
    shared = SharedBase.from_pretrained(adapter.base, reward=folder, **how).eval()
    return scores_of(shared, sequences, batch_size)


def chat(
    folder: str | Path,
    ask: Callable[[], str | None],
    base: str | None = None,
    load_in_4bit: bool = False,
    dtype: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **sampling: Any,
) -> list[dict[str, str]]:
    """Talk to a saved policy; its answers appear on the screen as they are written.

    Args:
        folder: of the adapter.
        ask: gives what the person says next; "/new" begins anew, None or "" ends.
        base: name or folder of the base; None: the one that the adapter names.
        load_in_4bit: hold the base in NF4.
        dtype: of the base; None: as it was saved.
        chat_template_kwargs: arguments of the chat template.
        **sampling: of `generate`: max_new_tokens, temperature, ...

    Returns:
        The last conversation's messages. A tokenizer without a chat template continues texts instead.
    """
    adapter = _on_its_base(folder, base)
    if adapter.start is None:
        raise ValueError(f"The adapter in {str(folder)!r} gives scores and writes no text: give a policy's.")
    given = {"dtype": "auto"} | loading(load_in_4bit, dtype) | {"revision": adapter.revision or "main"}
    model = load_causal_lm(adapter.base, **given)
    model, tokenizer = PeftModel.from_pretrained(model, str(folder)).eval(), _tokenizer(adapter)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = {"eos_token_id": eos_ids(model, tokenizer) or None, "pad_token_id": tokenizer.eos_token_id}
    messages: list[dict[str, str]] = []
    while said := ask():
        if said == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": said})
        if tokenizer.chat_template is None:
            inputs = tokenizer(said, return_tensors="pt")
        else:
            how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            inputs = tokenizer.apply_chat_template(messages, **(how | (chat_template_kwargs or {})))
        inputs = inputs.to(model.device)
        ids = model.generate(**inputs, do_sample=True, streamer=streamer, **ends, **sampling)
        answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    return messages


def _tokenizer(adapter: adapters.Named) -> PreTrainedTokenizerBase:
    return adapter.load_tokenizer()


def _tokenizer_of(adapter: adapters.Named, model: Any) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer; the base's where that has tokens, added for padding, say, that the model lacks:
    llama.cpp's converter refuses those."""
    tokenizer, ids = _tokenizer(adapter), model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= ids:
        return tokenizer
    added = [token for token, i in tokenizer.get_vocab().items() if i >= ids]
    warnings.warn(
        f"The adapter's tokenizer has {added[0]!r} and the model has {ids} ids only: the base's tokenizer is written.",
        UserWarning,
        stacklevel=3,
    )
    plain: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(adapter.base, revision=adapter.revision or "main")
    plain.chat_template = tokenizer.chat_template
    return plain


def loading(load_in_4bit: bool, dtype: str | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: where a base is held, in how many bits, and in which precision."""
    device = PartialState().device
    computed_in: Any = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in (None, "auto"):
        computed_in = dtype
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed_in)
    how = {"quantization_config": nf4} if load_in_4bit else {}
    return args_of_gpu(device) | how | ({"dtype": dtype} if dtype is not None else {})


def _on_its_base(folder: str | Path, base: str | None) -> adapters.Named:
    """The adapter in `folder` on `base`, or on the base that it names, of the revision that it names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: nobody names its base.
    """
    folder = Path(folder)
    if not (folder / adapters.CONFIG).is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {adapters.CONFIG}: give the folder that save_model() wrote.")
    config = adapters.read_config(folder)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"The adapter in {str(folder)!r} does not name its base: give it with --base.")
    return adapters.Named(name, folder, None if base else config.get("revision"))


@torch.no_grad()
def _outputs(model: Any, scored: bool) -> Tensor:
    """Log-probs (2, 32, vocabulary), or scores (2,), of the same random tokens, float32."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0)).to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return logits[:, 0] if scored else logits.log_softmax(dim=-1)
