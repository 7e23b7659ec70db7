"""Run a generation: ask for what the journal lacks, check what comes, write the records.

One thread (this one) decides, checks and writes; the others only wait for the endpoint.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from mmit.data.faults import SampleError
from mmit.data.generate.answers import RejectedError, read_answer
from mmit.data.generate.client import Client, RefusedError, Reply, StoppedError, UnreachableError
from mmit.data.generate.journal import Journal
from mmit.data.generate.prompts import Request
from mmit.data.generate.questions import Questions
from mmit.data.generate.records import RECORDS, Outcome, done_line, line, write_records
from mmit.data.generate.screen import Bar, noticing_signals, open_bar
from mmit.data.generate.settings import Endpoint, Generation
from mmit.errors import ConfigError, DataError, Interrupted, MmitError

PATIENCE = 50
"""So many questions in a row without a good answer end the run: something is wrong that money does not mend."""

_CHARACTERS_PER_TOKEN = 3
_TOKENS_PER_PICTURE = 1500


def generate(generation: Generation, *, progress: bool = True) -> Outcome:
    """Ask for all that is not in the journal yet, and write ``records.jsonl``; the same call continues a stopped run.

    Raises ConfigError (no key, an endpoint that takes no request), DataError (the source, too many bad annotations, no
    good answer for long), Interrupted on Ctrl-C and SIGTERM; in each case all answers are kept and the records written.
    """
    client = Client(generation.endpoint, api_key(generation.endpoint))
    questions = Questions(generation)
    with Journal(generation.out) as journal, open_bar(len(questions), shown=progress) as bar:
        run = _Run(questions, client, journal, bar)
        try:
            run.ask_all()
        finally:
            done = write_records(generation.out / RECORDS, journal, run.keys)
        return Outcome(
            records=generation.out / RECORDS,
            done=done,
            rejected=run.rejected,
            failed=run.failed,
            left=run.left,
            bad=tuple(questions.bad),
            usage=journal.usage,
            cost=run.cost(),
            stopped=run.stopped,
        )


def api_key(endpoint: Endpoint) -> str:
    """The key in the variable that the settings name; "" where they name none. Raises ConfigError."""
    if not endpoint.api_key_env:
        return ""
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"the environment variable {endpoint.api_key_env} holds no key; set it, or drop api_key_env")
    return key


class _Run:
    """The state of a run; ``keys`` are all questions in order, asked or not."""

    def __init__(self, questions: Questions, client: Client, journal: Journal, bar: Bar) -> None:
        self.generation = questions.generation
        self.questions = questions
        self.client = client
        self.journal = journal
        self.bar = bar
        self.keys: dict[str, None] = {}
        self.rejected = self.failed = self.left = 0
        self.stopped = ""
        self._error: MmitError | None = None
        self._in_vain = 0
        self._largest_prompt = 0
        self._fresh = iter(questions)
        self._again: deque[Request] = deque()
        self._pending: dict[Future[Reply], tuple[Request, str]] = {}

    def ask_all(self) -> None:
        """Ask until nothing is left to ask, or the run has to stop. Raises what stopped it, once all is written."""
        workers = self.generation.endpoint.concurrency
        with ThreadPoolExecutor(workers, thread_name_prefix="generate") as pool, noticing_signals(self._interrupt):
            try:
                while self._fill(pool, workers):
                    self._take_some(FIRST_COMPLETED)
            except MmitError as error:
                self._stop("ended by an error", error)
            except BaseException:
                self.client.stop.set()
                raise
            self._take_some(ALL_COMPLETED)  # what is under way is paid for
            if self.stopped:
                self._fill(pool, workers)  # asks nothing more, but answers of earlier runs belong into the records
        if self._error is not None:
            raise self._error

    def cost(self) -> float:
        """The cost of all answers so far, 0 without a price."""
        price, usage = self.generation.price, self.journal.usage
        return price.of(usage.prompt_tokens, usage.completion_tokens) if price else 0.0

    def _fill(self, pool: ThreadPoolExecutor, workers: int) -> bool:
        """Hand out questions until all threads are busy; False where none is."""
        while len(self._pending) < workers:
            fresh = not self._again
            request = next(self._fresh, None) if fresh else self._again.popleft()
            if request is None:
                break
            key = request.key({**self.client.settings, "see": self.generation.see})
            if fresh and not self._is_open(key):
                continue
            if not self.stopped and not self._is_affordable(request):
                if self._pending:
                    self._again.appendleft(request)
                    break
                self.stopped = f"max_cost {self.generation.max_cost:g}"
            if self.stopped:
                self.left += 1
                continue
            self._pending[pool.submit(self._ask, request)] = request, key
        return bool(self._pending)

    def _is_open(self, key: str) -> bool:
        """True for a question seen for the first time that has no good answer and was not given up."""
        if key in self.keys:
            self.bar.step()
            return False
        self.keys[key] = None
        given_up = self.journal.rejections(key) > self.generation.reask
        self.rejected += given_up
        if given_up or self.journal.is_done(key):
            self.bar.step()
            return False
        return True

    def _is_affordable(self, request: Request) -> bool:
        """True where even the longest answers, to this and to all that is under way, keep within ``max_cost``."""
        price, most = self.generation.price, self.generation.max_cost
        if price is None or not most:
            return True
        requests = [request, *(pending for pending, _ in self._pending.values())]
        prompts = sum(max(self._largest_prompt, _prompt_tokens(each)) for each in requests)
        return self.cost() + price.of(prompts, len(requests) * self.generation.endpoint.max_tokens) <= most

    def _ask(self, request: Request) -> Reply:
        """In another thread."""
        return self.client.ask(self.questions.messages(request))

    def _take_some(self, when: str) -> None:
        finished, _ = wait(self._pending, return_when=when)
        for future in finished:
            self._take(future)

    def _take(self, future: Future[Reply]) -> None:
        request, key = self._pending.pop(future)
        try:
            reply = future.result()
        except StoppedError:
            self.left += 1
            return
        except ConfigError as error:
            self.left += 1
            self._stop("the endpoint takes no request", error)
            return
        except (RefusedError, UnreachableError, SampleError) as error:
            self.journal.append({**line(request, key, "failed"), "reason": str(error)})
            self.failed += 1
            self._vain(str(error))
        else:
            self._judge(reply, request, key)
        self.bar.show(self.journal.usage, self.cost(), stopped=self.stopped)

    def _judge(self, reply: Reply, request: Request, key: str) -> None:
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        self._largest_prompt = max(self._largest_prompt, reply.prompt_tokens)
        settings = self.generation
        try:
            turns = _turns(reply, request)
        except RejectedError as error:
            entry = {**line(request, key, "rejected"), "reason": str(error), "text": reply.text, "usage": usage}
            self.journal.append(entry)
            if self.journal.rejections(key) <= settings.reask:
                self._again.append(request)
            else:
                self.rejected += 1
                self.bar.step()
            self._vain(f"rejected: {error}")
        else:
            entry = done_line(request, key, turns, model=settings.endpoint.model, see=settings.see)
            self.journal.append({**entry, "usage": usage})
            self._in_vain = 0
            self.bar.step()
        if settings.max_cost and not reply.is_counted:
            reason = "the server states no usage, so max_cost cannot be kept: set it to 0"
            self._stop("no usage", ConfigError(f"{settings.endpoint.base_url}: {reason}"))

    def _vain(self, reason: str) -> None:
        self._in_vain += 1
        if self._in_vain >= PATIENCE:
            message = f"{PATIENCE} questions in a row had no good answer, the last: {reason}"
            self._stop("no good answers", DataError(f"{self.generation.endpoint.base_url}: {message}"))

    def _interrupt(self) -> None:
        self._stop("interrupted", Interrupted("interrupted; the same command asks for the rest"))

    def _stop(self, why: str, error: MmitError) -> None:
        self.client.stop.set()
        self.stopped = self.stopped or why
        self._error = self._error or error


def _turns(reply: Reply, request: Request) -> list[tuple[str, str]]:
    if not reply.is_whole:
        raise RejectedError("the answer was cut off: max_tokens, or a filter")
    if not reply.text.strip():
        raise RejectedError("the answer is empty")
    return read_answer(reply.text, request.kind, question=request.question)


def _prompt_tokens(request: Request) -> int:
    """No less than what a request's prompt is likely to take."""
    texts = [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in request.messages]
    pictures = sum(not isinstance(message["content"], str) for message in request.messages)
    return sum(map(len, texts)) // _CHARACTERS_PER_TOKEN + pictures * _TOKENS_PER_PICTURE
