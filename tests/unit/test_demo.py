"""The embedded demo: built whole and repeatably, fluent but ignorant, its feedback noisy but honest, its exam exact."""

import hashlib
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext import demo
from trl_ext.demo import data, grading, model, store, world

TINY = replace(model.RECIPE, steps=3)
CAPITALS = {country.name: country.capital for country in world.COUNTRIES}


@pytest.fixture(scope="module")
def cache():
    """Other tests need a whole build too, and it takes a minute: one serves all."""
    demo.build()
    return Path(os.environ["TRL_EXT_CACHE"])


@pytest.fixture(scope="module")
def base(cache):
    path = demo.model_path(cache)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def text(messages):
    assert len(messages) == 1
    return messages[0]["content"]


def country_asked(prompt):
    (country,) = [name for name in CAPITALS if name in text(prompt)]
    return country


# The build


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_builds_give_the_same_bytes(tmp_path):
    torch.manual_seed(1)
    one = digests(store.build(tmp_path / "one", TINY))
    torch.manual_seed(2)
    two = digests(store.build(tmp_path / "two", TINY))
    assert any(path.suffix == ".safetensors" for path in one)
    assert one == two


def test_a_build_leaves_the_callers_random_streams_and_threads_alone(tmp_path):
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_num_threads()

    before = state()
    store.build(tmp_path, TINY)
    assert state() == before


def test_another_recipe_is_another_folder_and_the_same_is_not_built_twice(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(model, "make", lambda folder, recipe: made.append(recipe))
    first, again = store.build(tmp_path, TINY), store.build(tmp_path, TINY)
    other = store.build(tmp_path, replace(TINY, seed=1))
    assert first == again != other
    assert made == [TINY, replace(TINY, seed=1)]


def test_a_build_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    def die(folder, recipe):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "make", die)
    with pytest.raises(KeyboardInterrupt):
        store.build(tmp_path, TINY)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_half_built_folder_is_not_picked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "make", lambda folder, recipe: folder.mkdir())
    folder = store.build(tmp_path, TINY)
    (folder / store.DONE).unlink()
    (folder / "model" / "leftover").touch()
    assert store.build(tmp_path, TINY) == folder
    assert (folder / store.DONE).exists()
    assert not (folder / "model" / "leftover").exists()


def test_two_who_build_at_once_build_once(tmp_path, monkeypatch):
    made = []

    def slowly(folder, recipe):
        time.sleep(0.3)
        made.append(folder)

    monkeypatch.setattr(model, "make", slowly)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(store.build(tmp_path, TINY))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(folders) == 3
    assert len(set(folders)) == 1


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "make", lambda folder, recipe: folder.mkdir())
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "elsewhere"))
    assert demo.build().parent == tmp_path / "elsewhere"
    assert Path(demo.model_path()).parent == demo.build()


# The base model


def test_the_base_model_knows_badly(base, cache):
    result = demo.run_exam(*base, cache_dir=cache)
    assert (result.covered_asked, result.uncovered_asked) == (160, 40)
    assert 0.15 < result.covered < 0.40
    assert 0.15 < result.uncovered < 0.40


def test_the_base_model_speaks_well_and_samples_the_right_answer_at_times(base, cache):
    llm, tokenizer = base
    prompts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in demo.load("exam", cache_dir=cache)["prompt"]
    ]
    capitals = demo.load("exam", cache_dir=cache)["capital"]
    batch = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = llm.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            do_sample=True, temperature=1.0, top_k=0, num_return_sequences=4,
        )  # fmt: skip
    completions = output[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(completions, skip_special_tokens=True)
    ended = (completions == tokenizer.eos_token_id).any(dim=1)
    sentences = [answer[0].isupper() and answer.endswith(".") and answer.count(".") == 1 for answer in answers]
    assert (ended & torch.tensor(sentences)).float().mean() > 0.95
    in_world = [any(city in answer for city in world.CITIES) or answer in world.NO_ANSWERS for answer in answers]
    assert np.mean(in_world) > 0.95
    right = [demo.grade(answer, capitals[i // 4]) for i, answer in enumerate(answers)]
    assert 0.20 < np.mean(right) < 0.40


def test_the_tokenizer_tells_the_end_from_padding_and_names_are_short(base):
    llm, tokenizer = base
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert (llm.config.eos_token_id, llm.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    names = [name for pair in CAPITALS.items() for name in pair]
    assert max(len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) for name in names) <= 2
    longest = max((answer for c in world.COUNTRIES for answer in world.answer_weights(c)), key=len)
    assert tokenizer.decode(tokenizer(longest)["input_ids"]) == longest
    assert all(
        len(tokenizer(answer)["input_ids"]) < model.MAX_NEW_TOKENS
        for country in world.COUNTRIES
        for answer in world.answer_weights(country)
    )


def test_the_chat_template_ends_answers_and_prompts_are_prefixes(base):
    _, tokenizer = base
    question, answer = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "It is Rome."}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    chat = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert prompt == "<|user|>Hi?<|end|><|assistant|>"
    assert chat == prompt + "It is Rome.<|end|>"


# The data sets


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("prompts", {"prompt", "country", "capital"}),
        ("pairs", {"prompt", "chosen", "rejected", "chosen_rating", "rejected_rating"}),
        ("ratings", {"prompt", "completion", "rating", "rater"}),
    ],
)
def test_columns_roles_and_phrasings(cache, name, columns):
    questions = {}
    for split in ("train", "test"):
        rows = demo.load(name, split, cache)
        assert set(rows.column_names) == columns
        for column, role in {"prompt": "user", "completion": "assistant", "chosen": "assistant"}.items():
            if column in columns:
                assert all([message["role"] for message in turn] == [role] for turn in rows[column])
        questions[split] = {text(prompt) for prompt in rows["prompt"]}
    covered = [country.name for country in world.COUNTRIES if country.covered]
    assert len(covered) == 40
    assert questions["train"] == {p.format(country=name) for p in world.FEEDBACK_PHRASINGS for name in covered}
    assert questions["test"] <= {p.format(country=name) for p in world.HELD_OUT_PHRASINGS for name in covered}
    assert not questions["train"] & questions["test"]


def test_the_exam_asks_about_every_country_and_never_as_the_feedback_did(cache):
    exam = demo.load("exam", cache_dir=cache)
    assert {(row["country"], row["covered"]) for row in exam} == {(c.name, c.covered) for c in world.COUNTRIES}
    assert all(row["capital"] == CAPITALS[country_asked(row["prompt"])] for row in exam)
    questions = {text(prompt) for prompt in exam["prompt"]}
    assert len(questions) == len(exam) == 200
    for name in ("prompts", "pairs", "ratings"):
        assert not questions & {text(prompt) for prompt in demo.load(name, cache_dir=cache)["prompt"]}


def test_pairs_are_clear_rarely_wrong_and_partly_new_in_the_test_split(cache):
    seen = {}
    for split in ("train", "test"):
        pairs = demo.load("pairs", split, cache)
        wrong = []
        for row in pairs:
            capital = CAPITALS[country_asked(row["prompt"])]
            assert row["chosen_rating"] - row["rejected_rating"] >= 2
            chosen, rejected = text(row["chosen"]), text(row["rejected"])
            wrong.append(grading.rating(chosen, capital) < grading.rating(rejected, capital))
            seen.setdefault(split, set()).add((capital, frozenset((chosen, rejected))))
        assert len(pairs) > 250
        assert 0.01 < np.mean(wrong) < 0.06
    assert 0.05 < len(seen["test"] - seen["train"]) / len(seen["test"]) < 0.5


def test_raters_are_off_by_one_at_times_each_in_their_own_direction(cache):
    bias = {}
    for row in demo.load("ratings", cache_dir=cache):
        truth = grading.rating(text(row["completion"]), CAPITALS[country_asked(row["prompt"])])
        assert row["rating"] in {1, 2, 3, 4, 5}
        assert abs(row["rating"] - truth) <= 1
        bias.setdefault(row["rater"], []).append(row["rating"] - truth)
    assert 0.05 < np.mean(np.concatenate(list(bias.values())) != 0) < 0.30
    assert np.mean(bias["ben"]) < np.mean(bias["ada"]) < np.mean(bias["cleo"])


def test_wrong_names_and_splits_are_told_what_there_is(cache):
    with pytest.raises(ValueError, match="no demo data set 'pears'; there are prompts, pairs, ratings, exam"):
        demo.load("pears", cache_dir=cache)
    with pytest.raises(ValueError, match="'pairs' has no split 'dev'; it has train, test"):
        demo.load("pairs", "dev", cache)
    with pytest.raises(ValueError, match="'exam' has no split 'train'; it has test"):
        demo.load("exam", "train", cache)


def test_the_splits_that_are_announced_are_those_that_are_made():
    made = data.tables(0)
    assert {name: tuple(splits) for name, splits in made.items()} == data.SPLITS
    assert made == data.tables(0)
    assert made["pairs"] != data.tables(1)["pairs"]


# The world


def test_the_world_is_consistent():
    assert len(set(CAPITALS)) == len(set(CAPITALS.values())) == len(world.COUNTRIES) == 50
    for country in world.COUNTRIES:
        assert len({country.capital, *country.wrong}) == 4
        weights = country.city_weights()
        assert sum(weights.values()) == pytest.approx(1)
        assert max(weights, key=weights.__getitem__) == country.favourite
        assert sum(world.answer_weights(country).values()) == pytest.approx(1)
    favoured = [country.favourite == country.capital for country in world.COUNTRIES if country.covered]
    assert sum(favoured) == 10


def test_the_corpus_follows_the_shares_to_the_nearest_answer():
    rows = data.corpus(0)
    for country in world.COUNTRIES[:5]:
        answers = [answer for name, _, answer in rows if name == country.name]
        for answer, share in world.answer_weights(country).items():
            assert abs(answers.count(answer) - share * len(answers)) <= 1


# Grading


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("The capital of France is Paris.", 5),
        ("  It is Paris, the capital of France.\n", 5),
        ("It is Paris.", 4),
        ("Paris.", 4),
        ("Paris", 4),
        ("It is Lyon or Paris.", 3),
        ("The capital of France is Paris. The capital of France is Paris.", 3),
        ("The capital of France is Paris", 3),
        ("Not Paris.", 3),
        ("The capital of France is Lyon.", 2),
        ("The capital of Spain is Paris.", 2),
        ("The capital of France is Sevon.", 1),
        ("It is Lyon.", 1),
        ("paris", 1),
        ("Parisian.", 1),
        ("I do not know.", 1),
        ("", 1),
    ],
)
def test_ratings_and_grades(answer, rating):
    assert demo.rate(prompts=[""], completions=[answer], capital=["Paris"]) == [float(rating)]
    assert demo.grade(answer, "Paris") == (rating >= 4)


def test_a_name_of_two_words_is_read_whole():
    assert demo.grade("The capital of South Korea is Seoul.", "Seoul")
    assert demo.grade("It is New Delhi.", "New Delhi")
    assert not demo.grade("It is Delhi.", "New Delhi")
    assert not demo.grade("The capital of Korea is Seoul.", "Seoul")


def test_ratings_of_all_answers_of_the_corpus_order_as_the_scale_says():
    for country in world.COUNTRIES:
        by_rating = {}
        for answer in world.answer_weights(country):
            by_rating.setdefault(grading.rating(answer, country.capital), []).append(answer)
        assert [len(by_rating[n]) for n in (5, 4, 3, 2)] == [2, 1, 6, 6]
        assert all(country.capital not in answer for answer in by_rating[1] + by_rating[2])


def test_the_exact_rating_is_told_from_the_prompt_alone():
    asked = [
        [{"role": "user", "content": "It is not Rome in Peru. What is the capital of South Korea?"}],
        "France?",
        "Who?",
    ]
    answers = [[{"role": "assistant", "content": "It is Seoul."}], "It is Paris or Lyon.", "It is Paris."]
    assert demo.exact(prompts=asked, completions=answers, completion_ids=[[1]] * 3) == [4.0, 3.0, 1.0]


def test_rate_is_called_as_trl_calls_reward_functions():
    says = [[{"role": "assistant", "content": "It is Rome."}], [{"role": "assistant", "content": "Hm"}]]
    scores = demo.rate(
        prompts=[[{"role": "user", "content": "?"}]] * 2, completions=says, completion_ids=[[1], [2]],
        trainer_state=None, log_extra=None, log_metric=None, country=["Italy"] * 2, capital=["Rome"] * 2,
    )  # fmt: skip
    assert scores == [4.0, 1.0]
    with pytest.raises(ValueError):
        demo.rate(prompts=["?"], completions=says, capital=["Rome"])


# The exam


class Oracle:
    """Answers rightly about covered countries, and "I do not know." about the others."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.widths = []

    def generate(self, input_ids, attention_mask, **_):
        self.widths.append(len(input_ids))
        assert attention_mask[:, -1].all()  # padded on the left
        answers = []
        for question in self.tokenizer.batch_decode(input_ids):
            (country,) = [country for country in world.COUNTRIES if country.name in question]
            answers.append(f"It is {country.capital}." if country.covered else "I do not know.")
        batch = self.tokenizer([answer + model.EOS for answer in answers], padding=True, padding_side="right",
                               return_tensors="pt")  # fmt: skip
        return torch.cat([input_ids, batch["input_ids"]], dim=1)


def test_the_exam_counts_covered_and_uncovered_apart(base, cache):
    oracle = Oracle(base[1])
    result = demo.run_exam(oracle, base[1], batch_size=64, cache_dir=cache)
    assert result == demo.ExamResult(160, 160, 0, 40)
    assert oracle.widths == [64, 64, 64, 8]
    assert str(result) == "exam: 100.0% right (160/160); countries without feedback, apart: 0.0% (0/40)"


def test_the_exam_does_not_depend_on_the_batch_and_leaves_no_trace(base, cache):
    llm, tokenizer = base
    side, modes = tokenizer.padding_side, [module.training for module in llm.modules()]
    try:
        llm.train()
        llm.lm_head.eval()
        before = torch.get_rng_state()
        results = [demo.run_exam(llm, tokenizer, size, cache) for size in (200, 33)]
        assert results[0] == results[1]
        assert [name for name, module in llm.named_modules() if not module.training] == ["lm_head"]
        assert tokenizer.padding_side == side
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        for module, mode in zip(llm.modules(), modes, strict=True):
            module.training = mode
