"""The tiny chat model: its tokenizer, its architecture and how it is taught. CPU only, the same bits every time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_ext.demo import data

EOS, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
MAX_NEW_TOKENS = 16  # the longest answer of the corpus fits
NO_STATE = -1  # marks tokens that the model is not taught: questions and padding

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """All that shapes the base model: its size and its training."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 4
    steps: int = 700
    batch_size: int = 16
    learning_rate: float = 5e-3
    warmup_steps: int = 30


RECIPE = Recipe()


def make(folder: Path, recipe: Recipe) -> None:
    """Teach the model of ``recipe`` and save it with its tokenizer into ``folder``."""
    rows = data.corpus(recipe.seed)
    tokenizer = _fit_tokenizer(rows, recipe.vocab_size)
    with _reproducible(recipe.seed):
        model = _new_model(tokenizer, recipe)
        _teach(model, _encode(tokenizer, rows), recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit_tokenizer(rows: Sequence[tuple[str, str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE fitted on the corpus, with the chat template; end of text and padding are different tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each text once: a rare name is then nearly as well worth a token as a common one.
    bpe.train_from_iterator(sorted({text for _, *texts in rows for text in texts}), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Inside, torch is seeded, on the CPU and on one thread; outside, it is as before.

    ``torch.manual_seed`` would reseed the accelerators too, hence the default generator. The number of threads decides
    the order of sums, and with it the last bits of the weights; one thread is hardly slower for so small a model, and
    far faster than two on a machine that is busy.
    """
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.enable_grad())
        torch.set_num_threads(1)
        torch.default_generator.manual_seed(seed)
        yield


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


@dataclass(frozen=True)
class _Lessons:
    """The corpus as tensors.

    ``ids`` (examples, tokens): right-padded. ``states`` (examples, tokens): for each token of an answer the row of
    ``frequencies`` that is its target, ``NO_STATE`` elsewhere. ``frequencies`` (states, vocabulary): shares.
    ``lengths`` (examples,): tokens before the padding.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    states: torch.Tensor
    frequencies: torch.Tensor


def _encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str, str]]) -> _Lessons:
    """Tokens, and how often each token comes next in the corpus, for the same country and first tokens of an answer.

    Those frequencies are the targets, rather than the one token that an example happens to have: the expectation is
    the same, the noise far less, and half a minute is enough to teach the model the shares of right and wrong.

    After the end of an answer the targets are all tokens of the answer and of its country. Nobody generates past the
    end, but reward models read their score there. A big model has the whole answer in that state; this small one has to
    be taught it.
    """
    questions = tokenizer([f"{USER}{question}{EOS}{ASSISTANT}" for _, question, _ in rows])["input_ids"]
    answers = tokenizer([f"{answer}{EOS}" for _, _, answer in rows])["input_ids"]
    countries = tokenizer([f" {country}" for country, _, _ in rows])["input_ids"]
    lengths = torch.tensor(
        [len(question) + len(answer) + 1 for question, answer in zip(questions, answers, strict=True)]
    )
    ids = torch.full((len(rows), int(lengths.max())), int(tokenizer.pad_token_id))
    states = torch.full_like(ids, NO_STATE)
    state_numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    occurrences: list[tuple[int, int]] = []  # (state, next token)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        start, end = len(question), len(question) + len(answer)
        prefixes = [(rows[row][0], tuple(answer[:n])) for n in range(len(answer) + 1)]
        numbers = [state_numbers.setdefault(prefix, len(state_numbers)) for prefix in prefixes]
        occurrences += zip(numbers, answer, strict=False)
        occurrences += [(numbers[-1], token) for token in (*countries[row], *answer)]
        ids[row, :end] = torch.tensor(question + answer)
        states[row, start : end + 1] = torch.tensor(numbers)
    counts = torch.zeros(len(state_numbers), len(tokenizer))
    counts.index_put_(tuple(torch.tensor(occurrences).T), torch.ones(len(occurrences)), accumulate=True)
    return _Lessons(ids, lengths, states, counts / counts.sum(dim=1, keepdim=True))


def _teach(model: LlamaForCausalLM, lessons: _Lessons, recipe: Recipe) -> None:
    """Next-token training on the answers, with a warm-up and then a linear fall of the learning rate to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / recipe.warmup_steps, 1 - step / recipe.steps)
    )
    epochs = 1 + recipe.steps * recipe.batch_size // len(lessons.ids)
    order = torch.cat([torch.randperm(len(lessons.ids)) for _ in range(epochs)])
    model.train()
    for batch in order.split(recipe.batch_size)[: recipe.steps]:
        longest = int(lessons.lengths[batch].max())
        # No attention mask: padding is on the right and attention looks left, so no real token ever sees it.
        logits = model(input_ids=lessons.ids[batch, :longest]).logits[:, :-1]
        states = lessons.states[batch, 1:longest]
        is_taught = states != NO_STATE
        loss = torch.nn.functional.cross_entropy(logits[is_taught], lessons.frequencies[states[is_taught]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
