"""Who answers the questions of judge.py: a local model, or an OpenAI-compatible endpoint."""

import contextlib
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..running.errors import UserError, require

# Seconds before a request is repeated: doubled each time, up to the longest.
FIRST_DELAY = 1.0
LONGEST_DELAY = 60.0

LONGEST_REPLY = 2**24  # bytes

# What a server says where a request is too long: no reason to ask again without a limit.
TOO_LONG = re.compile(r"too (large|long|big|high)|at most|maximum|exceed|context")

GREEDY = 1e-9  # temperature: a gap of one float32 rounding step between two logits decides


class Reply(NamedTuple):
    """What came back: the judge's text, or the reason why there is none."""

    text: str = ""
    cut: bool = False  # by --judge-tokens
    error: str = ""


class LocalJudge:
    """A Hugging Face causal language model, asked greedily, in its chat template where it has one.

    Args:
        path: a folder or a hub id.
        device, dtype: as of --device and --dtype. The weights themselves are of `dtype`, since
            nothing is trained.
        max_new_tokens: of an answer.
        batch_size: questions asked at a time.
    """

    def __init__(
        self, path: str, device: str, dtype: str, max_new_tokens: int, batch_size: int
    ) -> None:
        from ..models.loading import load_policy
        from ..models.precision import round_
        from ..running.device import pick_device, pick_dtype

        place, _ = pick_device(device)
        model, self.tokenizer = load_policy(path, "--judge")
        self.model = round_(model.to(place), pick_dtype(dtype, place))
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def _without_special_tokens(self, text: str) -> str:
        """`text` with a space in each special token.

        Spelled out in a text, <|im_end|> would end the user's turn, and the text could answer for
        the judge.
        """
        from ..data.chat import special_tokens

        for token in special_tokens(self.tokenizer):
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """(number of a question, its reply). A question longer than the context fails."""
        from ..data.chat import decode_parts, encode_prompt
        from ..models.loading import end_token_ids
        from ..models.padding import context_of
        from ..rollout import sample_completions

        rows = []
        for question in questions:
            message = {"role": "user", "content": self._without_special_tokens(question)}
            rows.append(encode_prompt(self.tokenizer, [message]))
        context = context_of(self.model.config) or 10**9
        fitting = [i for i, ids in enumerate(rows) if len(ids) + self.max_new_tokens <= context]
        for i in sorted(set(range(len(rows))) - set(fitting)):
            limit = f"the judge's context of {context}"
            yield i, Reply(error=f"{len(rows[i])} tokens and --judge-tokens exceed {limit}")
        for start in range(0, len(fitting), self.batch_size):
            numbers = fitting[start : start + self.batch_size]
            _, completions, ended = sample_completions(
                self.model,
                [rows[i] for i in numbers],
                temperature=GREEDY,
                max_new_tokens=self.max_new_tokens,
                eos_token_ids=end_token_ids(self.model, self.tokenizer),
                seed=0,
                batch_size=self.batch_size,
                stop=None,
            )
            for i, completion, by_itself in zip(numbers, completions, ended):
                text = decode_parts(self.tokenizer, rows[i], completion)[1]
                yield i, Reply(text, cut=not by_itself)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key to wherever it is redirected, and make a GET of the request."""

    def redirect_request(self, *args: object) -> None:
        """Follow no redirect."""
        return None


class EndpointJudge:
    """An OpenAI-compatible endpoint, asked at temperature 0.

    The key comes from OPENAI_API_KEY, and is written nowhere.

    Args:
        url: http(s)://host/v1.
        model: its name at the endpoint.
        max_new_tokens: of an answer.
        batch_size: requests at a time.
        timeout: seconds to wait for a whole answer.
        retries: requests repeated after a timeout or HTTP 408, 429 or 5xx.
    Raises:
        UserError: the URL has a user or a query, or the key characters that no key has.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int,
        batch_size: int,
        timeout: float,
        retries: int,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            more = parts.username or parts.password or parts.query or parts.fragment
            plain = parts.port != 0 and bool(parts.hostname) and not more
        except ValueError:  # a port that is not a number
            plain = False
        require(
            plain,
            "--judge: expected http(s)://host/v1, without a user or a query: a key goes into "
            "OPENAI_API_KEY",
        )
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.batch_size = model, batch_size
        self.timeout, self.retries = timeout, retries
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        fits = self.key.isascii() and self.key.isprintable() and " " not in self.key
        require(
            fits,
            "OPENAI_API_KEY: holds characters that no key has (a space, a line end): set it again",
        )
        self.opener, self.closed = urllib.request.build_opener(_NoRedirect), threading.Event()
        self.parameters = {"temperature": 0, "max_tokens": max_new_tokens}

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """(number of a question, its reply) as they come, `batch_size` requests at a time."""
        todo, replies = queue.SimpleQueue(), queue.SimpleQueue()
        for item in enumerate(questions):
            todo.put(item)

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not self.closed.is_set():
                    i, question = todo.get_nowait()
                    replies.put((i, _outcome(self._ask, question)))

        for _ in range(min(self.batch_size, len(questions))):
            _in_background(work)
        try:
            for _ in questions:
                i, reply = replies.get()
                if isinstance(reply, Exception):
                    raise reply
                yield i, reply
        finally:
            self.closed.set()

    def _ask(self, question: str) -> Reply:
        """One answer, asked for at most 1 + retries times.

        A request with a parameter that the server refuses by name is repeated as it wants it.

        Raises:
            UserError: the endpoint would not answer any question.
        """
        parameters, refused, delay, attempt = self.parameters, [], FIRST_DELAY, 0
        while True:
            wait = delay
            try:
                status, headers, body = self._post(question, parameters)
                if status == 200:
                    if parameters != self.parameters and refused:
                        self.parameters = parameters
                        instead = ", ".join(parameters) or "neither"
                        told = f"{', '.join(refused)}; asked with {instead}"
                        print(f"--judge: {self.url} refuses {told}")
                    text, cut, problem = _read_reply(body)
                    return Reply(self._without_key(text), cut, self._without_key(problem))
                said = " ".join(body[:2000].decode("utf-8", "replace").split())
                reason = self._without_key(f"HTTP {status}: {said[:200]}")
                if status in (401, 403, 404, 405) or status < 400:
                    check = "check the address, --judge-model and OPENAI_API_KEY"
                    raise UserError(f"--judge: {self.url}: {reason}: {check}")
                if status not in (408, 429) and status < 500:
                    wanted = _as_wanted(parameters, refused, said)
                    if wanted is None:
                        return Reply(error=reason)  # this question is refused, say as too long
                    parameters = wanted
                    continue
                after = headers.get("Retry-After", "")
                wait = max(delay, float(after)) if after.isdecimal() else delay
            # No connection, a timeout, an answer broken off.
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason = self._without_key(f"{type(cause).__name__}: {cause}")
            attempt, delay = attempt + 1, 2 * delay
            if attempt > self.retries or self.closed.wait(min(wait, LONGEST_DELAY)):
                return Reply(error=reason)

    def _post(
        self, question: str, parameters: dict[str, float]
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of the answer to a question.

        Raises:
            OSError, http.client.HTTPException: none came, or not within the timeout.
        """
        messages = [{"role": "user", "content": question}]
        body = json.dumps({"model": self.model, "messages": messages} | parameters).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, body, headers)
        deadline, found = time.monotonic() + self.timeout, queue.SimpleQueue()

        def ask() -> tuple[int, http.client.HTTPMessage, bytes]:
            try:
                response = self.opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                return response.status, response.headers, _read_body(response, deadline)

        # In a thread of its own, since the timeout of a socket begins anew with each byte.
        _in_background(lambda: found.put(_outcome(ask)))
        try:
            answer = found.get(timeout=self.timeout)
        except queue.Empty:
            answer = TimeoutError(f"timed out: no whole answer in {self.timeout:g} s")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _without_key(self, text: str) -> str:
        """`text` with *** for the key."""
        return text.replace(self.key, "***") if self.key else text


def _in_background(work: Callable[[], None]) -> None:
    """In a thread that does not keep the program from ending, as those of an executor do."""
    threading.Thread(target=work, daemon=True).start()


def _outcome(function: Callable, *args: object) -> object:
    """What a function returns, or the exception that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _as_wanted(
    parameters: dict[str, float], refused: list[str], said: str
) -> dict[str, float] | None:
    """Parameters without the one that a message refuses, or with the name that it has instead.

    None where it refuses none of them.

    Args:
        refused: names refused before; this one is added.
    """
    name = next((name for name in parameters if re.search(rf"\b{name}\b", said)), "")
    if not name or TOO_LONG.search(said) or len(refused) == 4:
        return None
    refused.append(name)
    others = [other for other in re.findall(r"\bmax_\w*tokens\b", said) if other not in refused]
    new_name = others[0] if others and "tokens" in name else ""
    kept = {key: value for key, value in parameters.items() if key != name}
    return kept | ({new_name: parameters[name]} if new_name else {})


def _read_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body of a response, up to LONGEST_REPLY.

    Raises:
        OSError, http.client.HTTPException: it does not come whole, or not in time.
    """
    body, length = bytearray(), response.headers.get("Content-Length", "")
    while len(body) <= LONGEST_REPLY and (part := response.read1(2**16)):
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    missing = min(int(length), LONGEST_REPLY) - len(body) if length.isdecimal() else 0
    if missing > 0:
        raise http.client.IncompleteRead(bytes(body), missing)
    return bytes(body)


def _read_reply(body: bytes) -> Reply:
    """The text in a chat completion; parts of it are joined.

    One without any text (a model that thought until it was cut) is an empty text.
    """
    try:
        choice = json.loads(body)["choices"][0]
        content, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        size = f" ({len(body)} bytes)" if len(body) > LONGEST_REPLY else ""
        return Reply(error=f"no chat completion{size}: {body[:80]!r}")
    parts = content if isinstance(content, list) else [content or ""]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        return Reply(error=f"no text in it: {content!r:.80}")
    return Reply("".join(texts), cut)
