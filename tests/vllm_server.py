"""A stand-in for `vllm serve`: the parts of its HTTP interface that are used here, over a model that Transformers runs,
token by token, so that ids and log-probabilities are true."""

import copy
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import tiny_llama
from trl_ext.generation import vllm_probe


@contextmanager
def served() -> "Iterator[StandIn]":
    """A stand-in over the tiny model, whom runs ask less at their start."""
    with patch.multiple(vllm_probe, TOKENS=4, PROMPTS=4):
        server = StandIn(tiny_llama())
        try:
            yield server
        finally:
            server.stop()


class StandIn:
    """A server that can be stopped and started again on its port.

    Args:
        model: a causal language model; it is not changed.
        processed: it was started with `--logprobs-mode processed_logprobs`.

    Attributes:
        adapters: the PEFT models by name, as loaded now.
        asked: bodies of all requests for completions.
        loads: names of all adapters that were ever loaded.
        stale: it says that it loads adapters, and answers without them.
        updating: VLLM_ALLOW_RUNTIME_LORA_UPDATING is set.
        die_after, hang_after: completions after which it stops, or keeps silent for `silence` seconds once.
    """

    def __init__(self, model: Any, processed: bool = True) -> None:
        self.model, self.processed = model.eval(), processed
        self.adapters: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.stale, self.updating = False, True
        self.die_after = self.hang_after = -1
        self.silence = 0.0
        self.failures: list[int] = []  # statuses of the next responses
        self.lock = threading.RLock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """From nothing: no adapter is loaded."""
        self.adapters = {}
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def load(self, name: str, path: str) -> tuple[int, dict[str, Any]]:
        if not self.updating:
            return 404, {"detail": "Not Found"}
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        with self.lock:
            self.adapters[name] = copy.deepcopy(self.model) if self.stale else merged(self.model, Path(path))
            self.loads.append(name)
        return 200, {}

    def unload(self, name: str) -> tuple[int, dict[str, Any]]:
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return 200, {}

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.asked.append(body)
            if len(self.asked) == self.die_after:
                threading.Thread(target=self.stop, daemon=True).start()
                time.sleep(0.1)
                return 500, {}
            hangs = len(self.asked) == self.hang_after
        if hangs:
            time.sleep(self.silence)
        model = self.model if body["model"] == "base" else self.adapters.get(body["model"])
        if model is None:
            return _error(404, f"The model `{body['model']}` does not exist.")
        with self.lock, torch.no_grad():
            ids, told = self._sampled(model, body)
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": told}, "finish_reason": "length"}
        return 200, {"choices": [choice]}

    def _sampled(self, model: Any, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        ids, told = list(body["prompt"]), []
        draws = torch.Generator().manual_seed(body["seed"])
        for _ in range(body["max_tokens"]):
            raw = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            logits = processed(raw, ids, body)
            p = logits.softmax(dim=0)
            token = int(p.argmax() if body["temperature"] == 0 else torch.multinomial(p, 1, generator=draws))
            ids.append(token)
            told.append(float((logits if self.processed else raw).log_softmax(dim=0)[token]))
            if token in body["stop_token_ids"]:
                break
        return ids[len(body["prompt"]) :], told


def merged(model: Any, folder: Path) -> Any:
    """A copy of the model with a plain LoRA added to its weights. PEFT would draw weights before it loads them, and
    take random numbers of the trainer that runs beside this server."""
    model, config = copy.deepcopy(model), json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "adapter_model.safetensors")
    for name, down in weights.items():
        if ".lora_A." in name:
            layer = model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A.")[0])
            up = weights[name.replace("lora_A", "lora_B")]
            layer.weight.data += (up @ down) * (config["lora_alpha"] / config["r"])
    return model


def processed(raw: Tensor, ids: list[int], body: dict[str, Any]) -> Tensor:
    """Logits after penalty, temperature, top-k, top-p and min-p, in vLLM's order."""
    logits = raw.clone()
    seen = torch.tensor(sorted(set(ids)))
    penalty = body["repetition_penalty"]
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    logits = logits / (body["temperature"] or 1.0)
    p = logits.softmax(dim=0)
    logits[p < body["min_p"] * p.max()] = -torch.inf
    if body["top_k"] > 0:
        logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
    p, order = logits.softmax(dim=0).sort(descending=True)
    logits[order[(p.cumsum(dim=0) - p) >= body["top_p"]]] = -torch.inf
    return logits


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "Error", "code": status}}


class _Handler(BaseHTTPRequestHandler):
    owner: StandIn

    def do_GET(self) -> None:
        names = [{"id": "base", "parent": None}, *({"id": n, "parent": "base"} for n in self.owner.adapters)]
        self._send(200, {"data": names} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.owner.failures:
            self._send(self.owner.failures.pop(0), {"error": {"message": "out of order"}})
        elif self.path == "/v1/load_lora_adapter":
            self._send(*self.owner.load(body["lora_name"], body["lora_path"]))
        elif self.path == "/v1/unload_lora_adapter":
            self._send(*self.owner.unload(body["lora_name"]))
        else:
            self._send(*self.owner.complete(body))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except OSError:  # who asked is gone
            pass

    def log_message(self, *_: Any) -> None:
        pass
