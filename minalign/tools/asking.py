"""Who answers the questions of judge.py: a local model, or an OpenAI-compatible endpoint."""

import concurrent.futures
import http.client
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..running.errors import UserError, require

# Seconds before a request is repeated: doubled each time, up to the longest.
FIRST_DELAY = 1.0
LONGEST_DELAY = 60.0

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
        timeout: seconds to wait for an answer.
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
        self.model, self.max_new_tokens = model, max_new_tokens
        self.batch_size, self.timeout, self.retries = batch_size, timeout, retries
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        fits = self.key.isascii() and self.key.isprintable() and " " not in self.key
        require(
            fits,
            "OPENAI_API_KEY: holds characters that no key has (a space, a line end): set it again",
        )
        self.opener, self.closed = urllib.request.build_opener(_NoRedirect), threading.Event()

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """(number of a question, its reply) as they come, `batch_size` requests at a time."""
        pool = concurrent.futures.ThreadPoolExecutor(self.batch_size)
        try:
            number_of = {pool.submit(self._ask, text): i for i, text in enumerate(questions)}
            for future in concurrent.futures.as_completed(number_of):
                yield number_of[future], future.result()
        finally:
            self.closed.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: str) -> Reply:
        """One answer, asked for at most 1 + retries times.

        Raises:
            UserError: the endpoint would not answer any question.
        """
        content = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_new_tokens,
        }
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        delay = FIRST_DELAY
        for attempt in range(1 + self.retries):
            wait = delay
            try:
                request = urllib.request.Request(self.url, body, headers)
                with self.opener.open(request, timeout=self.timeout) as response:
                    text, cut, problem = _read_reply(response.read())
                return Reply(self._without_key(text), cut, self._without_key(problem))
            except urllib.error.HTTPError as error:
                with error:
                    reason = self._without_key(f"HTTP {error.code}: {_detail(error)}")
                if error.code in (401, 403, 404, 405) or error.code < 400:
                    check = "check the address, --judge-model and OPENAI_API_KEY"
                    raise UserError(f"--judge: {self.url}: {reason}: {check}") from None
                if error.code not in (408, 429) and error.code < 500:
                    return Reply(error=reason)  # this question is refused, say as too long
                after = error.headers.get("Retry-After", "")
                wait = max(delay, float(after)) if after.isdecimal() else delay
            # No connection, a timeout, an answer broken off.
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason = self._without_key(f"{type(cause).__name__}: {cause}")
            if attempt < self.retries and self.closed.wait(min(wait, LONGEST_DELAY)):
                break
            delay *= 2
        return Reply(error=reason)

    def _without_key(self, text: str) -> str:
        """`text` with *** for the key."""
        return text.replace(self.key, "***") if self.key else text


def _detail(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in one short line."""
    try:
        said = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    return " ".join(said.split())[:200] or str(error.reason)


def _read_reply(body: bytes) -> Reply:
    """The text in a chat completion.

    One without any text (a model that thought until it was cut) is an empty text.
    """
    try:
        choice = json.loads(body)["choices"][0]
        text, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError):
        return Reply(error=f"no chat completion: {body[:80]!r}")
    if not isinstance(text, str | None):
        return Reply(error=f"no text in it: {text!r:.80}")
    return Reply(text or "", cut)
