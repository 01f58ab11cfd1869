"""A sample of the zoo, families built as unlike as they come; and that the zoo sees what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zoo import checks, configs, run, table
from trl_ext.roles.lm_head import LMHead

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SAMPLE = {
    "gpt2": "right",  # learned positions, projections that are stored the other way round
    "gemma2": "right",  # both softcaps, a sliding window
    "falcon+alibi": "right",  # positions by ALiBi, attention and MLP side by side
    "gpt_oss": "right",  # attention sinks, experts
    "deepseek_v3": "right",  # latent attention, grouped experts
    "jamba": "right",  # recurrent layers
    "opt": "right",  # tokens flattened before the MLP
    "mixtral": "right",  # LoRA on the experts' parameters
    "gemma4_text": "right",  # layers that share keys and values
    "electra": "right",  # layers between trunk and LM head
    "llama+dynamic": "refused",  # positions that depend on the longest row
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def findings_of(name: str, folder: Path) -> list[dict[str, Any]]:
    findings: list[dict[str, Any]] = []
    checks.run(configs.config_of(name), folder, lambda finding: findings.append(checks.as_json(finding)))
    return findings


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", SAMPLE)
def test_family(name: str, tmp_path: Path) -> None:
    findings = findings_of(name, tmp_path)
    assert checks.verdict(findings) == SAMPLE[name], [f for f in findings if f["verdict"] != "right"]
    assert SAMPLE[name] != "right" or findings[-1]["check"] == "end"


def test_it_sees_a_wrong_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ext.roles.base.head_of", lambda causal_lm: LMHead(causal_lm.lm_head, None, 1.001))
    found = {f["check"]: f["verdict"] for f in findings_of("llama", tmp_path)}
    assert found["roles, rollout"] == found["generation"] == found["merged"] == "wrong"


def test_it_tells_a_refusal_from_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr("trl_ext.roles.base.SharedBase.logprobs", fail)
    assert checks.verdict(findings_of("llama", tmp_path)) == "raw"


def test_the_page_has_every_model_type() -> None:
    named = [line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert named == configs.names()


def test_a_page() -> None:
    def result(verdict: str, *findings: tuple[str, str, float | None, str]) -> dict[str, Any]:
        keys = ("check", "verdict", "difference", "note")
        return {"verdict": verdict, "seconds": 9.0, "findings": [dict(zip(keys, f, strict=True)) for f in findings]}

    results = {
        "llama": result(
            "right", ("packs", "right", None, "False"), ("mixed", "right", 2e-6, ""), ("recomputed", "absent", None, "")
        ),
        "bert": result("refused", ("build", "refused", None, "It cannot be.")),
    }
    for name, found in results.items():
        found |= {"name": name, "state": {"transformers": "5.23.0", "peft": "0.21.2", "torch": "2.13.0+cpu"}}
    text = table.page(results, ["bert", "llama"], checks.LIMITS)
    assert "With Transformers 5.23.0, PEFT 0.21.2 and PyTorch 2.13.0: 2 entries" in text
    assert "1 right, 1 refused, 0 wrong" in text
    bert, llama = text.splitlines()[-2:]
    assert bert == "| `bert` | BertLMHeadModel | refused |  |  | It cannot be. |"
    assert llama.startswith("| `llama` | LlamaForCausalLM | right | 2e-06 |  | padding is computed")
    older = {"bert": {**results["bert"], "state": {**results["bert"]["state"], "transformers": "5.0.0"}}}
    both = table.page(results, ["bert", "llama"], checks.LIMITS, older)
    assert "With Transformers 5.0.0" in both and "| Verdict | With 5.0.0 |" in both
    bert, llama = both.splitlines()[-2:]
    assert "| refused | refused |" in bert and "| right | not in it |" in llama


def test_results_of_another_code_or_version_do_not_count(tmp_path: Path) -> None:
    out, state = tmp_path / "zoo.jsonl", run.fingerprint()
    lines = [
        {"name": "llama", "verdict": "right"},  # of before states were recorded
        {"name": "gpt2", "verdict": "right", "state": {**state, "code": "another"}},
        {"name": "opt", "verdict": "right", "state": {**state, "transformers": "4.0"}},
        {"name": "bert", "verdict": "right", "state": state},
        {"name": "bert", "verdict": "wrong", "state": {**state, "code": "another"}},
    ]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {name: found["verdict"] for name, found in run.known(out, state).items()} == {"bert": "right"}
    assert set(run.known(out)) == {"llama", "gpt2", "opt", "bert"}
