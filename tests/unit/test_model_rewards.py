"""Rewards that models give, against the models asked directly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTJConfig,
    GPTJForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from tests.helpers import CHAT_TEMPLATE, tiny_classifier, tiny_llama, word_tokenizer
from trl_ext import SharedBase
from trl_ext.rewards.classifiers import longest_read
from trl_ext.rewards.models import classifier, fluency, reward_role
from trl_ext.rewards.scorer import RewardError, Scorer
from trl_ext.tokens import padded, reward_suffix
from trl_ext.types import Rollout

TEXTS = ["the cat sat", "a dog"]
CHAT = [[{"role": "user", "content": "the cat"}]]
EOS, NEWLINE, THE, CAT, SAT, TREE, BIG = 1, 4, 7, 9, 12, 19, 24  # of `word_tokenizer`
# A template with an argument, as Qwen3's `enable_thinking`: what is asked differs by it.
LOUD = CHAT_TEMPLATE.replace(
    "{% if add_generation_prompt %}", "{% if loud %}big {% endif %}{% if add_generation_prompt %}"
)


def saved(folder: Path, **changes: Any) -> str:
    tiny_classifier(**changes).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_classifier_with_labels(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    from tests.helpers import _config

    torch.manual_seed(0)
    config = _config(num_labels=3)
    config.id2label, config.label2id = {0: "bad", 1: "fair", 2: "good"}, {"bad": 0, "fair": 1, "good": 2}
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    scores = classifier(str(tmp_path), label="good", batch_size=1)(completions=TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert score == pytest.approx(logits.softmax(-1)[2].item(), rel=1e-4)
    with pytest.raises(ValueError, match="has no label 'great': choose one of bad, fair, good"):
        classifier(str(tmp_path), label="great")
    with pytest.raises(ValueError, match="has several labels: choose one"):
        classifier(str(tmp_path))


@pytest.mark.parametrize(("count", "kind"), [(3, "multi_label_classification"), (1, None)])
def test_labels_that_stand_alone_have_a_probability_each(count: int, kind: str | None, tmp_path: Path) -> None:
    """As in Transformers' pipeline: a toxicity model says no to every label of a harmless text."""
    from transformers import pipeline

    folder = saved(tmp_path, num_labels=count, problem_type=kind)
    asked = pipeline("text-classification", folder, top_k=None, device="cpu")
    for text, score in zip(TEXTS, classifier(folder, label="LABEL_0")(completions=TEXTS), strict=True):
        expected = {row["label"]: row["score"] for row in asked([text])[0]}
        assert score == pytest.approx(expected["LABEL_0"], rel=1e-4)
        assert 0.0 < score < 1.0


def test_classifier_with_one_label_reads_with_its_own_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "judge")
    together = classifier(folder)(completions=TEXTS)
    model, tokenizer = tiny_classifier(), word_tokenizer()
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in TEXTS]
    assert together == pytest.approx(expected, rel=1e-4)
    assert classifier(folder, max_length=1)(completions=["the cat sat"]) == pytest.approx(
        classifier(folder)(completions=["the"]), rel=1e-4
    )


def test_a_regression_with_several_labels_gives_what_it_was_trained_on(tmp_path: Path) -> None:
    """As Transformers' pipeline: no softmax, by which an attribute would pay for the others being low."""
    folder = saved(tmp_path, num_labels=3, problem_type="regression")
    model, tokenizer = tiny_classifier(num_labels=3), word_tokenizer()
    expected = [model(**tokenizer(text, return_tensors="pt")).logits[0, 1].item() for text in TEXTS]
    assert classifier(folder, label="LABEL_1")(completions=TEXTS) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no 'score.weight', which would be random"):
        classifier(str(tmp_path), label="LABEL_1")


def test_a_classifier_without_a_pad_token(tmp_path: Path) -> None:
    folder, tokenizer = saved(tmp_path), word_tokenizer()
    together = classifier(folder)(completions=TEXTS)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model = tiny_classifier(pad_token_id=None)
    model.save_pretrained(folder)
    assert classifier(folder)(completions=TEXTS) == pytest.approx(together, rel=1e-4)


def test_a_reward_model_that_cannot_read_conversations(tmp_path: Path) -> None:
    scorer = Scorer([saved(tmp_path / "judge")])
    scorer.check("the cat")
    with pytest.raises(ValueError, match="tokenizer of the reward model 'judge' has no chat template"):
        scorer.check(CHAT[0])


def rollout_of_texts(prompt: str, completion: str) -> Rollout:
    ids, mask = padded([[THE]], 0)
    return Rollout([prompt], [completion], ids, mask, ids, mask, torch.tensor([True]))


def test_a_row_that_is_too_long_for_learned_positions_is_said(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=1, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    word_tokenizer().save_pretrained(tmp_path / "judge")
    scorer = Scorer([str(tmp_path / "judge")])
    assert scorer(rollout_of_texts("the", " cat"), {}).shape == (1, 1)
    with pytest.raises(RewardError, match="'judge' reads 8 tokens, and a prompt with its completion has 12"):
        scorer(rollout_of_texts("the cat " * 4, "the cat " * 2), {})


def test_roberta_counts_its_positions_after_its_padding(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=30, max_position_embeddings=10, pad_token_id=1, num_labels=1, **sizes)
    model = RobertaForSequenceClassification(config).eval()
    assert longest_read(model) == 8
    model(torch.full((1, 8), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, 9), 5))
    bert = BertConfig(vocab_size=30, max_position_embeddings=10, num_labels=1, **sizes)
    assert longest_read(BertForSequenceClassification(bert)) == 10
    assert longest_read(tiny_classifier()) is None, "rotary positions reach further"
    angles = GPTJConfig(vocab_size=30, n_positions=10, n_embd=8, n_layer=1, n_head=1, rotary_dim=4, num_labels=1)
    assert longest_read(GPTJForSequenceClassification(angles)) == 10, "and these are in a table"
    opt = OPTConfig(vocab_size=30, max_position_embeddings=10, ffn_dim=8, word_embed_proj_dim=8, num_labels=1, **sizes)
    assert longest_read(OPTForSequenceClassification(opt)) == 10, "of twelve it leaves out two"
    relative = DebertaV2Config(
        vocab_size=30, max_position_embeddings=10, relative_attention=True, position_biased_input=False, **sizes
    )
    assert longest_read(DebertaV2ForSequenceClassification(relative)) is None, "nothing is learned by place"


def test_xlnet_reads_its_score_at_the_last_place(tmp_path: Path) -> None:
    config = XLNetConfig(vocab_size=30, d_model=8, n_layer=1, n_head=1, d_inner=8, num_labels=1, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        XLNetForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    score = classifier(str(tmp_path))
    alone = [*score(completions=["the cat"]), *score(completions=["the red dog sat"])]
    assert score(completions=["the cat", "the red dog sat"]) == pytest.approx(alone, abs=1e-6)
    by_function = Scorer([str(tmp_path)])._functions[0]
    assert by_function(["the ", "the red "], ["cat", "dog sat"]) == pytest.approx(alone, abs=1e-6)


def test_fluency_is_the_references_mean_log_probability() -> None:
    base, tokenizer = SharedBase.from_model(tiny_llama()), word_tokenizer()
    prompts, answers = ["the red", "a"], [[9, 12, 1], [10]]
    got = fluency(base, tokenizer)(prompts=prompts, completion_ids=answers)
    for prompt, answer, score in zip(prompts, answers, got, strict=True):
        ids = torch.tensor([[*tokenizer(prompt)["input_ids"], *answer]])
        logprobs = tiny_llama()(ids).logits[0].log_softmax(-1)
        start = ids.shape[1] - len(answer)
        expected = [logprobs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]
        assert score == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_reward_role_reads_conversations(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    judge = SharedBase.from_model(tiny_llama())
    torch.nn.init.normal_(judge.heads["value"].weight)
    judge.save_pretrained(tmp_path / "judge")
    base = SharedBase.from_model(tiny_llama(), reward=str(tmp_path / "judge" / "value"))
    chat = [[{"role": "user", "content": "the cat"}]]
    got = reward_role(base, tokenizer)(prompts=chat * 2, completion_ids=[[SAT, EOS], [SAT]])
    asked = tokenizer.apply_chat_template(chat[0], add_generation_prompt=True, tokenize=True, return_dict=True)
    for score, answer in zip(got, [[SAT, EOS, NEWLINE], [SAT]], strict=True):  # as the template writes it
        ids = torch.tensor([[*asked["input_ids"], *answer]])
        assert score == pytest.approx(float(base.scores(ids, torch.ones_like(ids))), rel=1e-5)


def test_reward_role_reads_texts_as_they_are() -> None:
    base, tokenizer = SharedBase.from_model(tiny_llama()), word_tokenizer(CHAT_TEMPLATE)
    base.adapters["reward"], base.heads["reward"] = "value", base.heads["value"]
    torch.nn.init.normal_(base.heads["value"].weight)
    (score,) = reward_role(base, tokenizer)(prompts=["the cat"], completion_ids=[[SAT, EOS]])
    ids = torch.tensor([[THE, CAT, SAT, EOS]])
    assert score == pytest.approx(float(base.scores(ids, torch.ones_like(ids))), rel=1e-5)


def test_prompts_are_read_as_they_were_asked() -> None:
    """With arguments of the chat template: by their ids where the trainer passes them on, else as told."""
    base, tokenizer = SharedBase.from_model(tiny_llama()), word_tokenizer(LOUD)
    base.adapters["reward"], base.heads["reward"] = "value", base.heads["value"]
    torch.nn.init.normal_(base.heads["value"].weight)
    asked = tokenizer.apply_chat_template(CHAT[0], add_generation_prompt=True, return_dict=True, loud=True)["input_ids"]
    plain = tokenizer.apply_chat_template(CHAT[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked != plain
    ids, read = torch.tensor([[*asked, SAT, EOS]]), torch.tensor([[*asked, SAT, EOS, NEWLINE, BIG]])
    logprobs = tiny_llama()(ids).logits[0].log_softmax(-1)
    expected = {
        fluency: (logprobs[-3, SAT] + logprobs[-2, EOS]).item() / 2,
        reward_role: float(base.scores(read, torch.ones_like(read))),
    }
    loud = {"loud": True}
    written = Rollout(
        CHAT,
        [[{"role": "assistant", "content": "sat"}]],
        *padded([asked], 0),
        *padded([[SAT, EOS]], 0),
        torch.tensor([True]),
    )
    for make, score in expected.items():
        told = make(base, tokenizer, chat_template_kwargs=loud)
        assert told(prompts=CHAT, completion_ids=[[SAT, EOS]]) == pytest.approx([score], rel=1e-4)
        assert Scorer([told])(written, {})[0].tolist() == pytest.approx([score], rel=1e-4)
    assert Scorer([fluency(base, tokenizer)])(written, {})[0].tolist() == pytest.approx([expected[fluency]], rel=1e-4)


def test_every_eos_of_the_model_ends_what_the_reward_role_reads() -> None:
    """The template ends a turn with an id that the tokenizer does not call its EOS, as chat models do."""
    model, tokenizer = tiny_llama(), word_tokenizer(CHAT_TEMPLATE.replace("<eos>", " tree "))
    model.generation_config.eos_token_id = [TREE, EOS]
    base = SharedBase.from_model(model)
    base.adapters["reward"], base.heads["reward"] = "value", base.heads["value"]
    torch.nn.init.normal_(base.heads["value"].weight)
    asked = tokenizer.apply_chat_template(CHAT[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([[*asked, SAT, TREE, NEWLINE]])
    (score,) = reward_role(base, tokenizer)(prompts=CHAT, completion_ids=[[SAT, TREE]])
    assert score == pytest.approx(float(base.scores(ids, torch.ones_like(ids))), rel=1e-5)


# What follows an answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "suffix"),
    [
        (None, []),
        (CHAT_TEMPLATE, [NEWLINE]),
        (CHAT_TEMPLATE.replace("<eos>\n", "<eos>"), []),
        (CHAT_TEMPLATE.replace("<eos>\n", "<eos>\n cat \n"), [NEWLINE, CAT, NEWLINE]),
        (CHAT_TEMPLATE.replace("<eos>", ""), []),
    ],
    ids=["no-template", "chatml", "ends-at-eos", "longer", "no-eos"],
)
def test_reward_suffix(template: str | None, suffix: list[int]) -> None:
    assert reward_suffix(CHAT, word_tokenizer(template), [EOS]) == suffix
    assert reward_suffix(TEXTS, word_tokenizer(template), [EOS]) == [], "texts end with their EOS"


def test_reward_suffix_begins_after_the_first_end_of_the_answer() -> None:
    """Phi-3's template ends the turn, and then the whole conversation, where a reward model reads its score."""
    whole = word_tokenizer(CHAT_TEMPLATE + "{% if not add_generation_prompt %}cat<eos>{% endif %}")
    assert reward_suffix(CHAT, whole, [EOS]) == [NEWLINE, CAT, EOS]


def test_reward_suffix_with_several_eos_ids() -> None:
    assert reward_suffix(CHAT, word_tokenizer(CHAT_TEMPLATE), [CAT, EOS]) == [NEWLINE]
    assert reward_suffix(CHAT, word_tokenizer(CHAT_TEMPLATE), [CAT]) == []


@pytest.mark.parametrize("how", [{"add_generation_prompt": True}, {"add_generation_prompt": False}])
def test_how_a_prompt_ends_says_nothing_of_what_follows_an_answer(how: dict[str, Any]) -> None:
    of_turns = CHAT_TEMPLATE + "{% if add_generation_prompt %}cat{% endif %}"
    assert reward_suffix(CHAT, word_tokenizer(of_turns), [EOS], how) == [NEWLINE]
    going_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert reward_suffix(CHAT, word_tokenizer(of_turns), [EOS], going_on) == [NEWLINE]


def test_an_eos_before_the_answer_is_not_its_end() -> None:
    """As where BOS and EOS are one token, and the template ends no turn with it."""
    bos = "<eos>" + CHAT_TEMPLATE.replace("<eos>", "")
    assert reward_suffix(CHAT, word_tokenizer(bos), [EOS]) == []
