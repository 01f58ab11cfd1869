"""Completions by vLLM servers, which serve the same base and are given the policy's adapter anew after each update.

A server is a stock `vllm serve BASE --enable-lora`, on this machine or another. Ids go out and ids come back, over
/v1/completions, each with the log-probability that it was sampled with. Adapters travel as folders that both can see.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import logging
import math
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import torch
from transformers import GenerationConfig

from trl_ext.generation.rollouts import Answers, GenerationError, check_whole
from trl_ext.generation.vllm_probe import (
    TOLERANCE,
    check_adapter,
    check_base,
    check_same,
    probe_prompts,
    probe_sampling,
)
from trl_ext.tokens import as_ids

logger = logging.getLogger(__name__)
AT_A_TIME = 128  # requests to one server
ATTEMPTS = 4  # of one request
SHORT = 10.0  # seconds that a question about the server itself may take
BACKGROUND = "trl_ext: completions"  # what a thread is called that waits for them
_Result = TypeVar("_Result")


class Adapter(NamedTuple):
    """An adapter as servers know it: its name tells it from every other, and its folder is the same on both sides."""

    name: str
    folder: Path


class _Gone(Exception):
    """A server did not answer, or failed: it may be starting again."""


class _Refused(Exception):
    """A server will not do what it was asked, and would not if it was asked again."""


class _Server:
    """One server, and what is known of it.

    Attributes:
        lost: it did not come back in time.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout, self.lost = url.rstrip("/").removesuffix("/v1"), timeout, False
        self._loaded: set[str] = set()
        self._base = ""
        self._returns = 0
        self._lock = threading.Lock()

    def request(self, path: str, body: Any = None, timeout: float = SHORT) -> Any:
        """What GET `path` returns, or POST where there is a body; None where that is no JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            said = _message(error)
            if error.code >= 500 or error.code in (408, 429):
                raise _Gone(f"status {error.code}: {said}") from error
            raise _Refused(f"{said} (status {error.code})") from error
        except (OSError, http.client.HTTPException) as error:  # what breaks off while it is read, too
            raise _Gone(str(getattr(error, "reason", error)) or type(error).__name__) from error
        try:
            return json.loads(text)
        except ValueError:
            return None

    def is_up(self) -> bool:
        """Whether it says that it is well."""
        try:
            self.request("/health")
        except (_Gone, _Refused):
            return False
        return True

    def complete(self, request: dict[str, Any], adapter: Adapter | None) -> tuple[list[int], list[float]]:
        """Ids and log-probs of one completion."""
        name = self.name_of(adapter)
        try:
            response = self.request("/v1/completions", {"model": name, **request}, self.timeout)
        except _Refused as error:
            if adapter is None or "does not exist" not in str(error):
                raise
            raise _Gone(f"it has lost the adapter {name}") from error  # it was started again
        try:
            [choice] = response["choices"]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        except (KeyError, TypeError, ValueError) as error:
            raise _Refused("it returns neither token_ids nor logprobs: it is no vLLM of today") from error
        return ids, logprobs

    def name_of(self, adapter: Adapter | None) -> str:
        """What an adapter, or the bare base (None), is called there; the adapter is loaded first where the server has
        not got it."""
        with self._lock:
            if self._base and (adapter is None or adapter.name in self._loaded):
                return self._base if adapter is None else adapter.name
            cards = (self.request("/v1/models") or {}).get("data", [])
            self._base = next((card["id"] for card in cards if not card.get("parent")), "")
            self._loaded = {card["id"] for card in cards if card.get("parent")}
            if adapter is None:
                return self._base
            if adapter.name not in self._loaded:
                self._load(adapter)
            return adapter.name

    def _load(self, adapter: Adapter) -> None:
        try:
            self.request(
                "/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter.folder)}, self.timeout
            )
        except _Refused as error:
            if "already" in str(error):  # by another process of this run
                pass
            elif str(error).startswith("Not Found"):
                raise _Refused(
                    "it loads no adapters: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and "
                    "--enable-lora"
                ) from error
            else:
                raise _Refused(f"it cannot load the adapter in {str(adapter.folder)!r}: {error}") from error
        self._loaded.add(adapter.name)

    def unload(self, adapter: Adapter) -> None:
        """Forget an adapter, as far as the server is there and knows it."""
        self._loaded.discard(adapter.name)
        try:
            self.request("/v1/unload_lora_adapter", {"lora_name": adapter.name})
        except (_Gone, _Refused) as error:
            logger.debug("%s did not unload %s: %s", self.url, adapter.name, error)

    def comes_back(self, seen: int, wait: float, enough: Callable[[], bool]) -> bool:
        """Wait until it is up again, at most `wait` seconds, or until the others have done its work. The first thread
        waits, and the others for it: `seen` is how often it had come back when they asked it."""
        with self._lock:
            if self.lost or self._returns != seen:
                return not self.lost
            self._base, deadline = "", time.monotonic() + wait
            while not self.is_up():
                if enough():
                    return False
                if time.monotonic() > deadline:
                    self.lost = True
                    return False
                time.sleep(min(1.0, wait / 10))
            self._returns += 1
            return True

    @property
    def returns(self) -> int:
        """How often it has come back."""
        return self._returns


def _message(failure: urllib.error.HTTPError) -> str:
    """vLLM's own words in the body of an error."""
    said = ""
    try:
        said = failure.read().decode(errors="replace")
        body = json.loads(said)
        error = body.get("error", body)
        text = error.get("message", error.get("detail", said)) if isinstance(error, dict) else error
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        text = said
    return " ".join(str(text).split())[:300]


class VLLMServers:
    """Servers that share out completions; what one leaves undone, the others do.

    Args:
        urls: of each server, as in http://127.0.0.1:8000.
        wait: most seconds to wait for a server that is starting.
        timeout: most seconds that one completion may take, its time in the queue included.
    """

    def __init__(self, urls: Sequence[str], wait: float = 240.0, timeout: float = 600.0) -> None:
        self.servers, self.wait = [_Server(url, timeout) for url in urls], wait

    def wait_until_up(self) -> None:
        """Wait for all of them.

        Raises:
            ConnectionError: one is not up in time.
        """
        deadline = time.monotonic() + self.wait
        for server in self.servers:
            while not server.is_up():
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"No vLLM server is up at {server.url} after {self.wait:g} s: start one, or correct "
                        "vllm_server_base_url."
                    )
                time.sleep(min(1.0, self.wait / 10))

    def complete(
        self, requests: Sequence[dict[str, Any]], adapter: Adapter | None, only: _Server | None = None
    ) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probs of each request's completion.

        Args:
            requests: bodies for /v1/completions, without "model", one prompt each.
            adapter: None: the bare base.
            only: the server to ask; None: all of them.

        Raises:
            GenerationError: a server refuses, or none is left.
        """
        servers = self.servers if only is None else [only]
        for server in servers:
            server.lost = server.lost and not server.is_up()
        if all(server.lost for server in servers):
            for server in servers:
                server.lost = False  # wait for it once more
        work = _Work(requests, adapter, self.wait)
        while work.left and not work.failure and (up := [server for server in servers if not server.lost]):
            each = min(AT_A_TIME, math.ceil(len(work.left) / len(up)))
            threads = [threading.Thread(target=work.by, args=(s,), daemon=True) for s in up for _ in range(each)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for server in up:
                if server.lost and not work.failure:
                    logger.warning("The vLLM server at %s is gone (%s).", server.url, work.last)
        if work.failure:
            raise GenerationError(work.failure)
        if work.left:
            places = ", ".join(server.url for server in servers)
            raise GenerationError(
                f"No vLLM server answers any more at {places} (last: {work.last}; waited {self.wait:g} s): start one "
                "again."
            )
        return [work.done[number] for number in range(len(requests))]

    def check_same(self, base: Any, roles: Mapping[str, Adapter | None], tolerance: float = TOLERANCE) -> None:
        """Compare what each server says of a few tokens with what the roles of a base say.

        Args:
            roles: the adapter of each; None: the bare base.

        Raises:
            ValueError: they differ by more than `tolerance`.
        """
        prompts = probe_prompts(base)
        requests = [request_of(ids, probe_sampling(), seed) for seed, ids in enumerate(prompts)]
        for server, (role, adapter) in itertools.product(self.servers, roles.items()):
            said = Answers(*map(list, zip(*self.complete(requests, adapter, only=server), strict=True)))
            check = check_base if adapter is None else check_adapter
            check(base, role, prompts, said, tolerance, f"The vLLM server at {server.url}")

    def unload(self, adapter: Adapter) -> None:
        """Let every server forget an adapter."""
        for server in self.servers:
            if not server.lost:
                server.unload(adapter)


class _Work:
    """Requests that threads take from one queue; a request whose server fails goes back.

    Attributes:
        left: numbers of the requests that nobody has taken.
        done: what came of the others.
        failure: why nothing more is tried; empty while it is.
        last: what went wrong last.
    """

    def __init__(self, requests: Sequence[dict[str, Any]], adapter: Adapter | None, wait: float) -> None:
        self.requests, self.adapter, self.wait = requests, adapter, wait
        self.left = deque(range(len(requests)))
        self.done: dict[int, tuple[list[int], list[float]]] = {}
        self.attempts = [0] * len(requests)
        self.failure = self.last = ""

    def by(self, server: _Server) -> None:
        """What one thread does, until nothing is left or the server is gone."""
        while not self.failure:
            try:
                number = self.left.popleft()
            except IndexError:
                return
            seen = server.returns
            try:
                self.done[number] = server.complete(self.requests[number], self.adapter)
            except _Refused as error:
                self.failure = f"The vLLM server at {server.url} refuses: {error}."
            except _Gone as error:
                self.last, self.attempts[number] = f"{server.url}: {error}", self.attempts[number] + 1
                self.left.append(number)
                if self.attempts[number] >= ATTEMPTS:
                    self.failure = f"vLLM gave no answer in {ATTEMPTS} attempts (last: {self.last})."
                elif not server.comes_back(seen, self.wait, self._enough):
                    return

    def _enough(self) -> bool:
        return bool(self.failure) or len(self.done) == len(self.requests)


def request_of(ids: list[int], config: GenerationConfig, seed: int) -> dict[str, Any]:
    """The body for /v1/completions that samples as `config` says, from its own random numbers. What is left out would
    be as the server's generation_config.json has it."""
    return {
        "prompt": ids,
        "max_tokens": config.max_new_tokens,
        "stop_token_ids": as_ids(config.eos_token_id),
        "ignore_eos": True,  # another's: those that count are in stop_token_ids
        **sampling_settings(config),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "logprobs": 0,  # of the token that was sampled alone
        "return_token_ids": True,
    }


def sampling_settings(config: GenerationConfig) -> dict[str, Any]:
    """How `config` samples, in vLLM's words."""
    temperature = config.temperature if config.temperature is not None else 1.0
    return {
        "temperature": temperature if config.do_sample else 0.0,
        "top_p": config.top_p if config.top_p is not None else 1.0,
        "top_k": config.top_k or -1,  # 0 here, -1 there: all tokens
        "min_p": config.min_p or 0.0,
        "repetition_penalty": config.repetition_penalty if config.repetition_penalty is not None else 1.0,
    }


def is_plain(config: GenerationConfig) -> bool:
    """Whether it samples from the softmax of the logits as they are."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return sampling_settings(config) == plain


def in_background(work: Callable[[], _Result]) -> Future[_Result]:
    """What `work` returns or raises, in a thread that keeps no interpreter from ending, as an executor's would."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=BACKGROUND, daemon=True).start()
    return future


def drawn_seeds(count: int) -> list[int]:
    """Seeds for so many completions, from torch's random numbers: a run that resumes draws the same again."""
    return torch.randint(2**31 - 1, (count,)).tolist()


class AdapterFolders:
    """The adapters of a base as folders that are called after what is in them, so that one name is one adapter.

    Args:
        base: the `SharedBase`.
        folder: where they lie.
    """

    def __init__(self, base: Any, folder: Path) -> None:
        self.base, self.folder = base, folder.absolute()

    def write(self, adapter: str, own: bool = False) -> Adapter:
        """An adapter as it is now. Processes that hold the same adapter write the same folder, unless it is to be this
        process's `own`."""
        draft = self.folder / f".{adapter}-{os.getpid()}-{threading.get_ident()}"
        self.base.model.save_pretrained(str(draft), selected_adapters=[adapter])
        nested = draft / adapter  # where PEFT puts an adapter that is not called "default"
        inside = nested if nested.is_dir() else draft
        digest = hashlib.sha256((inside / "adapter_model.safetensors").read_bytes())
        digest.update(_in_order(json.loads((inside / "adapter_config.json").read_text(encoding="utf-8"))).encode())
        place = self.folder / f"{adapter}-{uuid4().hex if own else digest.hexdigest()[:16]}"
        try:
            if not place.is_dir():
                inside.replace(place)
        except OSError:  # another process was first
            if not place.is_dir():
                raise
        shutil.rmtree(draft, ignore_errors=True)
        return Adapter(place.name, place)


def _in_order(config: dict[str, Any]) -> str:
    """A LoRA's config as text. PEFT writes its sets as lists, in an order that differs from process to process."""
    ordered = {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in config.items()}
    return json.dumps(ordered, sort_keys=True)


class VLLMServerGenerator:
    """vLLM servers answer. Each is given the policy's adapter as it is at a rollout, and forgets the one before.

    Args:
        base: the `SharedBase`.
        servers: who answers; all of them must be up.
        folder: for adapters; the servers see it under the same name.
        tolerance: most nats that their log-probs of a token may differ from the base's own at the start, in the
            median.

    Attributes:
        processed: the servers give the log-probs that really sampled (`--logprobs-mode processed_logprobs`); those of
            others are known in plain sampling alone.

    Raises:
        ConnectionError: a server is not up in time.
        ValueError: one serves something else than this base, or the policy's LoRA is of a kind that vLLM cannot load.
    """

    def __init__(self, base: Any, servers: VLLMServers, folder: Path, tolerance: float) -> None:
        check_lora(base)
        self.base, self.servers, self.folders = base, servers, AdapterFolders(base, folder)
        self._now: dict[str, Adapter] = {}
        self._under_way: Future[Answers] | None = None
        servers.wait_until_up()
        processed = [self._speaks_for_base(server, tolerance) for server in servers.servers]  # all of them are asked
        self.processed = all(processed)

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `Generator.answers`."""
        return self.begin(prompt_ids, config, role).result()

    def begin(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Future[Answers]:
        """See `BackgroundGenerator.begin`. What was begun before is waited for: it needs its adapter until then."""
        if self._under_way is not None:
            wait([self._under_way])
        name = self.base.adapters[role]
        adapter = None if name is None else self._written(name)
        seeds = drawn_seeds(len(prompt_ids))
        requests = [request_of(ids, config, seed) for ids, seed in zip(prompt_ids, seeds, strict=True)]
        self._under_way = in_background(lambda: self._completed(requests, adapter, config))
        return self._under_way

    def _completed(self, requests: list[dict[str, Any]], adapter: Adapter | None, config: GenerationConfig) -> Answers:
        ids, logprobs = map(list, zip(*self.servers.complete(requests, adapter), strict=True))
        check_whole(ids, config)
        return Answers(ids, logprobs if self.processed or is_plain(config) else None)

    def _speaks_for_base(self, server: _Server, tolerance: float) -> bool:
        """See `check_same`."""

        def ask(prompts: list[list[int]], config: GenerationConfig, adapted: bool) -> Answers:
            adapter = self.folders.write(self.base.adapters["policy"], own=True) if adapted else None
            requests = [request_of(ids, config, seed) for seed, ids in enumerate(prompts)]
            try:
                told = self.servers.complete(requests, adapter, only=server)
            except GenerationError as error:
                raise ValueError(str(error)) from error
            finally:
                if adapter is not None:
                    server.unload(adapter)
                    shutil.rmtree(adapter.folder, ignore_errors=True)
            return Answers([ids for ids, _ in told], [logprobs for _, logprobs in told])

        return check_same(self.base, ask, tolerance, f"The vLLM server at {server.url}")

    def _written(self, name: str) -> Adapter:
        adapter, before = self.folders.write(name), self._now.get(name)
        if before is not None and before != adapter:
            self.servers.unload(before)
            shutil.rmtree(before.folder, ignore_errors=True)
        self._now[name] = adapter
        return adapter


def check_lora(base: Any) -> None:
    """Refuse LoRA that vLLM cannot load.

    Raises:
        ValueError: it is DoRA, has biases, or layers of different scale.
    """
    config = base.model.peft_config[base.adapters["policy"]]
    if config.use_dora or config.lora_bias:
        raise ValueError("vLLM loads plain LoRA only: leave out use_dora and lora_bias, or use_vllm.")
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            "vLLM scales every layer by lora_alpha / r: leave out rank_pattern and alpha_pattern, or use_vllm."
        )
