"""TRL 0.11.4's PPOTrainer over one base: policy adapter, value head on its trunk, reward adapter, as in its
multi-adapter example."""

import time

import torch
import work
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def main() -> None:
    given = work.arguments()
    if given.precision == "nf4" and not torch.cuda.is_available():
        raise SystemExit("Transformers 4.45 computes with 4 bits on a GPU only")
    tokenizer = work.tokenizer_of(given.model)
    work.end_completions(given, tokenizer)
    how = work.weights(given.precision)
    how["torch_dtype"] = how.pop("dtype")  # as it was called then
    judge = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=1, **how)
    get_peft_model(judge, LoraConfig(**work.lora(given, "SEQ_CLS"))).save_pretrained(f"{given.folder}/judge")
    del judge
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        given.model,
        peft_config=LoraConfig(**work.lora(given)),
        reward_adapter=f"{given.folder}/judge",
        **how,
    )
    config = PPOConfig(
        batch_size=given.batch,
        mini_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.batch // given.micro_batch,
        ppo_epochs=given.epochs,
        learning_rate=1e-5,
        accelerator_kwargs={"mixed_precision": "bf16" if given.precision == "autocast" else "no"},
    )
    trainer = PPOTrainer(config, model, None, tokenizer)
    ids = tokenizer(work.prompts(given))["input_ids"]
    sampling = {
        "max_new_tokens": given.new_tokens,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": tokenizer.pad_token_id,
    }
    clock = work.Clock()
    queries = [torch.tensor(row) for row in ids]
    for _ in range(given.updates):
        began = time.perf_counter()
        answers = trainer.generate(queries, return_prompt=False, batch_size=given.batch, **sampling)
        generated = time.perf_counter()
        whole = [torch.cat((query.to(answer.device), answer)) for query, answer in zip(queries, answers)]  # noqa: B905 (Python 3.11 everywhere, but of its day)
        inputs = tokenizer.pad({"input_ids": whole}, return_tensors="pt").to(model.pretrained_model.device)
        with torch.no_grad():
            scores = trainer.model.compute_reward_score(**inputs)[:, -1, 0]
        stats = trainer.step(queries, answers, list(scores))
        ended, train = time.perf_counter(), float(stats["time/ppo/optimize_step"])
        clock.add({"generate": generated - began, "score": ended - generated - train, "train": train})
    clock.report(given)


if __name__ == "__main__":
    main()
