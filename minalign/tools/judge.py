"""Two policies compared, pair by pair, by a language model as judge.

    python -m minalign judge --a runs/policy-1 --b runs/sft --prompts prompts.jsonl \\
        --judge Qwen/Qwen2.5-7B-Instruct
    python -m minalign judge --a new.jsonl --b old.jsonl \\
        --judge https://api.openai.com/v1 --judge-model gpt-4o-mini

--a and --b are policies (a run, a folder, a hub id), whose completions of --prompts are sampled, or
.jsonl files of prompt and completion. Of a file and a policy, the policy answers the file's
prompts. Of runs, --temperature, --max-new-tokens and --format are those that they had, and the
prompts those that they held out, where none are given.

Every pair is asked in both orders. Where both orders name one side, the pair is a win or a loss.
Where both say tie, it is a tie. Where they disagree, it is counted as inconsistent, and scored as a
tie. A pair with an answer that is not a verdict (unparsable) or that never came (failed) is counted
and not scored. Where none is scored, the exit status is not 0.
"""

import contextlib
import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..running.errors import require
from ..running.files import read_json_lines, whole_file, write_json, write_json_lines
from ..running.flag_groups import ColumnFlags, DeviceFlags, StopFlags
from ..running.flags import SEEDS, TEMPERATURES, as_given, dashed, flag
from ..running.logs import JsonLines
from ..running.run_folder import claimed_folder
from .asking import EndpointJudge, LocalJudge, Reply
from .settings import SAMPLING, agreed, parse_flags_of_runs, settings_of
from .sides import Pair, is_file, load_pairs
from .verdicts import ORDERS, make_question, parse_verdict, summarise, table, winner

FAILURES_IN_A_ROW = 20  # then the judge is taken to be gone

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a formula begins with in a spreadsheet

# Flags that may have another value on --resume: when and where it runs, not what is asked.
FREE_ON_RESUME = ("out", "resume", "device", "dtype", "batch_size", "timeout", "retries")


@dataclass
class Config(StopFlags, ColumnFlags, DeviceFlags):
    """Judging."""

    a: str = flag(
        "", "a policy, or a .jsonl file of prompts and completions: wins and losses are its own"
    )
    b: str = flag(
        "",
        "what it is compared with: a policy or a .jsonl file with the same prompts in the same "
        "order",
    )
    judge: str = flag(
        "", "a chat model (folder or hub id), or an OpenAI-compatible endpoint as http(s)://host/v1"
    )
    judge_model: str = flag(
        "", "name of the model at the endpoint; its key is read from OPENAI_API_KEY"
    )
    criterion: str = flag(
        "which answer is more helpful, correct and clear",
        "what makes an answer better, told to the judge",
    )
    judge_tokens: int = flag(
        512, "tokens of the judge's answer: one cut off is unparsable", "[1, inf)"
    )
    timeout: float | None = flag(
        None, "seconds to wait for a whole answer (default: 120)", "(0, 86400]"
    )
    retries: int | None = flag(
        None, "requests repeated after a timeout or HTTP 429 or 5xx (default: 4)", "[0, 20]"
    )
    batch_size: int = flag(8, "completions sampled, and questions asked, at a time", "[1, inf)")
    seed: int = flag(0, "seed of sampling (b's is one more) and of the intervals", SEEDS)
    out: str = flag("", "folder for answers and results (default: the next free runs/judge-N)")
    resume: bool = flag(False, "resume the run in --out: what is answered is not asked again")
    prompts: str = flag(
        "", "prompts of two policies: a .jsonl, .csv or .parquet file, a folder or a hub id"
    )
    max_new_tokens: int | None = flag(
        None, "tokens of a policy's completion (default: 128)", "[1, inf)"
    )
    temperature: float | None = flag(
        None, "of a policy's sampling; no top-k, no top-p (default: 1.0)", TEMPERATURES
    )
    format: str | None = flag(
        None,
        "a policy's prompts as its chat template or as plain text (default: auto, chat where it "
        "has one)",
        ("auto", "chat", "plain"),
    )


def is_endpoint(judge: str) -> bool:
    """Whether the judge is asked over HTTP."""
    return judge.lower().startswith(("http://", "https://"))


def resolve(config: Config) -> Config:
    """Check the flags together, and fill in defaults.

    Raises:
        UserError: a flag is missing, or some make no sense together.
    """
    for name in ("a", "b", "judge"):
        require(bool(getattr(config, name)), f"--{name} is missing (see --help)")
    sampling = {"max_new_tokens": 128, "temperature": 1.0, "format": "auto", "stop": None}
    endpoint = {"timeout": 120.0, "retries": 4}
    files = [side for side in (config.a, config.b) if is_file(side)]
    for side in files:
        require(
            Path(side).is_file(),
            f"{side}: no such file: give a .jsonl file of prompt and completion, or a policy",
        )
    for name in sampling:
        fits = len(files) < 2 or getattr(config, name) is None
        why = "is for sampling, and --a and --b are files: leave it out"
        require(fits, f"{dashed(name)} {why}")
    if files:
        require(not config.prompts, f"--prompts: {files[0]} has prompts already: leave it out")
    elif not config.prompts:
        runs = settings_of([config.a, config.b])
        had = agreed(runs, "dataset", "prompts") if runs else None
        require(bool(had), "--prompts is missing: what the two policies are to answer")
        require(config.columns is None, "--columns needs --prompts: a run knows its own")
    for name in ("judge_model", *endpoint):
        fits = is_endpoint(config.judge) or getattr(config, name) in (None, "")
        require(fits, f"{dashed(name)} needs an endpoint as --judge, http(s)://host/v1")
    require(
        not is_endpoint(config.judge) or bool(config.judge_model),
        "--judge-model is missing: the endpoint's model to ask",
    )
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return Config(**(sampling | endpoint | given))


class Answers:
    """<folder>/answers.jsonl, with every reply as it came.

    `replies` has the last one to each question: (pair, order) -> reply.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.replies, rows = folder / "answers.jsonl", {}, []
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):  # half a line of a run that was killed
                self.path.write_bytes(content[: content.rfind(b"\n") + 1])
            rows = read_json_lines(self.path, "pair", "order", *Reply._fields)
        for row in rows:
            reply = Reply(str(row["text"]), bool(row["cut"]), str(row["error"]))
            pair = row["pair"] if isinstance(row["pair"], int) else 0  # 0: of no question
            self.replies[pair, str(row["order"])] = reply
        self.lines = JsonLines(self.path, rows)

    def add(self, pair: int, order: str, reply: Reply) -> None:
        """Keep a reply, on disk at once."""
        self.replies[pair, order] = reply
        self.lines.append({"pair": pair, "order": order} | reply._asdict())


def ask_all(
    judge: LocalJudge | EndpointJudge, pairs: Sequence[Pair], answers: Answers, criterion: str
) -> None:
    """Ask every question that has no answer yet. Pairs count from 1.

    Raises:
        UserError: the judge seems to be gone.
    """
    every = [(number, order) for number in range(1, len(pairs) + 1) for order in ORDERS]
    missing = [key for key in every if key not in answers.replies or answers.replies[key].error]
    questions = []
    for number, order in missing:
        pair = pairs[number - 1]
        first, second = (getattr(pair, side) for side in order)
        questions.append(make_question(pair.prompt, first, second, criterion))
    failures = 0
    with contextlib.closing(judge.answers(questions)) as replies:
        bar = {"desc": "answers", "unit": "answer", "disable": None}
        for i, reply in tqdm(replies, total=len(missing), **bar):
            answers.add(*missing[i], reply)
            failures = failures + 1 if reply.error else 0
            kept = sum(not reply.error for reply in answers.replies.values())
            require(
                failures < FAILURES_IN_A_ROW,
                f"--judge: {failures} questions in a row failed (last: {reply.error}): fix that, "
                f"and resume with --resume --out {answers.path.parent}: {kept} answers are kept",
            )


def read_reply(reply: Reply) -> str:
    """The verdict in a reply: 1, 2, tie, unparsable or failed.

    An answer that was cut off is unparsable, whatever it ends with.
    """
    if reply.error:
        return "failed"
    return (not reply.cut and parse_verdict(reply.text)) or "unparsable"


def write_csv(path: Path, pairs: Sequence[Pair], answers: Answers) -> None:
    """Write every answer beside what it is about.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    with whole_file(path) as file:
        writer = csv.writer(file)
        writer.writerow(
            "pair order prompt completion_a completion_b answer verdict winner error".split()
        )
        for number, pair in enumerate(pairs, 1):
            for order in ORDERS:
                reply = answers.replies[number, order]
                verdict = read_reply(reply)
                said = [reply.text, verdict, winner(order, verdict), reply.error]
                texts = [f"'{t}" if t.startswith(FORMULA) else t for t in (*pair, *said)]
                writer.writerow([number, order, *texts])


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, ask, report."""

    def policies(config: Config) -> list[str]:
        return [side for side in (config.a, config.b) if not is_file(side)]

    config = parse_flags_of_runs(Config, __doc__, argv, "minalign judge", policies, SAMPLING)
    config = resolve(config)
    with claimed_folder(config, "judge", FREE_ON_RESUME) as (folder, _):
        compare(config, folder)


def compare(config: Config, folder: Path) -> None:
    """Ask about every pair that has no answer in the folder yet, and report.

    Raises:
        UserError: the judge seems to be gone, or no pair was scored.
    """
    if is_endpoint(config.judge):
        limits = config.judge_tokens, config.batch_size, config.timeout, config.retries
        judge = EndpointJudge(config.judge, config.judge_model, *limits)
    else:
        judge = LocalJudge(
            config.judge, config.device, config.dtype, config.judge_tokens, config.batch_size
        )
    if (folder / "config.json").exists():
        rows = read_json_lines(folder / "pairs.jsonl", *Pair._fields)
        pairs = [Pair(*(str(row[name]) for name in Pair._fields)) for row in rows]
    else:
        pairs = load_pairs(config)
        write_json_lines(folder / "pairs.jsonl", [pair._asdict() for pair in pairs])
        # Last: a folder with a config can be resumed.
        write_json(folder / "config.json", dataclasses.asdict(config) | as_given(config))
    answers = Answers(folder)
    ask_all(judge, pairs, answers, config.criterion)

    verdicts = [
        [read_reply(answers.replies[number, order]) for order in ORDERS]
        for number in range(1, len(pairs) + 1)
    ]
    results = summarise(verdicts, config.seed)
    write_csv(folder / "answers.csv", pairs, answers)
    write_json(folder / "results.json", results)
    print(f"a: {config.a}, b: {config.b}, judge: {config.judge_model or config.judge}")
    print(table(results))
    for reason in sorted({reply.error for reply in answers.replies.values()} - {""})[:3]:
        print(f"failed: {reason}")
    print(f"written to {folder}")
    require(results["scored"] > 0, "no pair was scored: see above, and answers.csv in that folder")
