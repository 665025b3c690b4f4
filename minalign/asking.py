"""Who answers the questions of minalign.judge: a local model, or an OpenAI-compatible endpoint."""

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

from .common import UserError, require

FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds before a request is repeated: doubled each time, up to the longest
GREEDY = 1e-9  # temperature: a gap of one float32 rounding step between two logits decides


class Reply(NamedTuple):
    """What came back: the judge's text and whether --judge-tokens cut it off; or, without a text, why there is none."""

    text: str = ""
    cut: bool = False
    error: str = ""


class LocalJudge:
    """A Hugging Face causal language model, asked greedily, in its chat template where it has one."""

    def __init__(self, path: str, device: str, dtype: str, max_new_tokens: int, batch_size: int):
        from .checkpoint import load_policy
        from .common import pick_device, pick_dtype

        place, _ = pick_device(device)
        model, self.tokenizer = load_policy(path, "--judge")
        self.model = model.to(place, pick_dtype(dtype, place))  # no training: the weights themselves may be bfloat16
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def _without_special_tokens(self, text: str) -> str:
        # Spelled out in a text, <|im_end|> would end the user's turn, and the text could answer for the judge.
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        for token in sorted(tokens, key=len, reverse=True):
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """The number of a question and its reply, `batch_size` at a time; one longer than the context fails."""
        from .chat import TokenizedPrompt, encode_prompt
        from .checkpoint import end_token_ids
        from .evaluate import decode_parts, sample_completions

        messages = ([{"role": "user", "content": self._without_special_tokens(question)}] for question in questions)
        rows = [TokenizedPrompt(encode_prompt(self.tokenizer, message)) for message in messages]
        context = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        fitting = [i for i, row in enumerate(rows) if len(row.ids) + self.max_new_tokens <= context]
        for i in sorted(set(range(len(rows))) - set(fitting)):
            yield i, Reply(error=f"{len(rows[i].ids)} tokens and --judge-tokens exceed the judge's context of {context}")
        for start in range(0, len(fitting), self.batch_size):
            numbers = fitting[start : start + self.batch_size]
            _, completions, ended = sample_completions(
                self.model, self.tokenizer, [rows[i] for i in numbers], temperature=GREEDY,
                max_new_tokens=self.max_new_tokens, eos_token_ids=end_token_ids(self.model, self.tokenizer), seed=0,
                batch_size=self.batch_size,
            )  # fmt: skip
            for i, completion, by_itself in zip(numbers, completions, ended):
                yield i, Reply(decode_parts(self.tokenizer, rows[i].ids, completion)[1], cut=not by_itself)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key to wherever it is redirected, and make a GET of the request."""

    def redirect_request(self, *args):
        return None


class EndpointJudge:
    """An OpenAI-compatible endpoint, asked at temperature 0; the key comes from OPENAI_API_KEY and is written nowhere."""

    def __init__(self, url: str, model: str, max_new_tokens: int, batch_size: int, timeout: float, retries: int):
        try:
            parts = urllib.parse.urlsplit(url)
            plain = (
                parts.port != 0 and parts.hostname and not (parts.username or parts.password or parts.query or parts.fragment)
            )
        except ValueError:  # of a port that is no number
            plain = False
        require(bool(plain), "--judge: expected http(s)://host/v1, without a user or a query: a key goes into OPENAI_API_KEY")
        self.url, self.model, self.max_new_tokens = url.rstrip("/") + "/chat/completions", model, max_new_tokens
        self.batch_size, self.timeout, self.retries = batch_size, timeout, retries
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        fits = self.key.isascii() and self.key.isprintable() and " " not in self.key
        require(fits, "OPENAI_API_KEY: holds characters that no key has (a space, a line end): set it again")
        self.opener, self.closed = urllib.request.build_opener(_NoRedirect), threading.Event()

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """The number of a question and its reply as they come, `batch_size` requests at a time."""
        pool = concurrent.futures.ThreadPoolExecutor(self.batch_size)
        try:
            number_of = {pool.submit(self._ask, question): i for i, question in enumerate(questions)}
            for future in concurrent.futures.as_completed(number_of):
                yield number_of[future], future.result()
        finally:
            self.closed.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: str) -> Reply:
        """One answer, asked for at most 1 + retries times; UserError where no question would ever be answered."""
        content = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        body = json.dumps(content | {"max_tokens": self.max_new_tokens}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
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
                    return Reply(error=reason)  # this question is refused: too long, for one
                after = error.headers.get("Retry-After", "")
                wait = max(delay, float(after)) if after.isdecimal() else delay
            except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, an answer broken off
                cause = getattr(error, "reason", error)
                reason = self._without_key(f"{type(cause).__name__}: {cause}")
            if attempt < self.retries and self.closed.wait(min(wait, LONGEST_DELAY)):
                break
            delay *= 2
        return Reply(error=reason)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def _detail(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in one short line."""
    try:
        said = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    return " ".join(said.split())[:200] or str(error.reason)


def _read_reply(body: bytes) -> Reply:
    """The text in a chat completion; one without any text (a model that thought until it was cut) is an empty text."""
    try:
        choice = json.loads(body)["choices"][0]
        text, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError):
        return Reply(error=f"no chat completion: {body[:80]!r}")
    return Reply(text or "", cut) if isinstance(text, str | None) else Reply(error=f"no text in it: {text!r:.80}")
