"""Ask a trained model: held-out questions with its answers, or a question of your own.

    python sample.py                            the newest run, three validation questions
    python sample.py out/gsm8k_jepa --prompt="..." --num_samples=2
    python sample.py out/gsm8k_jepa --best      the weights with the lowest validation loss
    python sample.py out/gsm8k_jepa --interactive   ask, read, ask again; Ctrl-D leaves

With --interactive an answer is printed while it is written. Ctrl-C ends it. Each question stands
alone: the model is not told of those before. Out of a pipe, every line is a question,
which is printed before its answer.
"""

import contextlib
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

from config import fail, parse_args, relocated
from data import load_data, same_split
from generate import Sampling, generate, generate_steps
from plumbing.processes import pick_device, run_main
from run import Run, chosen_run, prompt_of

CUT_OFF = " [cut off: no end of text]"


@dataclass(frozen=True)
class Args:
    # what to ask
    prompt: str = ""  # a question; empty asks held-out ones from the validation split
    system: str = ""  # what stands before the prompt; without it, the run's own system prompt
    interactive: bool = False  # keep asking for questions, a line each; one answer to each of them
    num_samples: int = 3  # held-out questions, or answers to the prompt
    # how to answer
    max_new_tokens: int = 256  # at most; the context may end earlier
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 50  # draw among the k likeliest tokens; 0 is all
    top_p: float = 1.0  # draw among the likeliest tokens whose probability reaches p
    seed: int = 1337  # the same seed gives the same answers
    # where
    out_dir: str = ""  # folder of the run, as train.py spells it; RUN says the same
    best: bool = False  # the run's best.pt (lowest val_ce) instead of its last checkpoint
    data_dir: str = ""  # folder of the data, if it is no longer where the run found it
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


class Question(NamedTuple):
    text: str
    prompt: list[int]  # the tokens that the answer continues
    right_answer: str | None


def main(argv: list[str]) -> None:
    values, runs = parse_args(Args, argv, f"python sample.py [RUN] [--key=value ...]\n\n{__doc__}")
    args = Args(**values)
    refuse(args, runs)
    if args.interactive and (unused := {"prompt", "num_samples"} & values.keys()):
        fail(f"{' and '.join(sorted(unused))}: not with --interactive, which asks for questions "
             "and answers each of them once")
    if "system" in values and not (args.prompt or args.interactive):
        fail("system stands before a prompt; held-out questions have their own")
    device, autocast = pick_device(args.device, args.dtype)
    run = chosen_run(runs, args.out_dir, device, args.best)
    print(f"run {run.path}, step {run.step}, trained on {run.provenance['data']['dataset']}")
    if args.interactive:
        return converse(run, args, values.get("system"), autocast)
    if args.prompt:
        questions = [own_question(run, args.prompt, values.get("system"))] * args.num_samples
    else:
        questions = held_out_questions(run, args)
    prompts, eot = [question.prompt for question in questions], run.tokenizer.eot
    with autocast():
        outputs = generate(run.model, prompts, args.max_new_tokens, eot, args.sampling)
    for question, output in zip(questions, outputs):
        ended = "" if output[-1] == eot else CUT_OFF
        print(f"\n--- question\n{question.text}\n--- {run.name} answers\n"
              f"{run.tokenizer.decode(output)}{ended}")
        if question.right_answer is not None:
            print(f"--- right answer\n{question.right_answer}")


def refuse(args: Args, runs: list[str]) -> None:
    """Exit on values that cannot work, before a model is loaded."""
    if len(runs) > 1:
        fail(f"one run at a time, got {' '.join(runs)}; a prompt is given as --prompt=\"...\"")
    if args.num_samples < 1 or args.max_new_tokens < 1:
        fail(f"num_samples={args.num_samples} and max_new_tokens={args.max_new_tokens} "
             "must be at least 1")
    if not 0 <= args.temperature < math.inf or args.top_k < 0 or not 0 < args.top_p <= 1:
        fail(f"temperature={args.temperature} and top_k={args.top_k} must not be below 0, and "
             f"top_p={args.top_p} must lie in (0, 1]")
    if not 0 <= args.seed < 2**63:
        fail(f"seed={args.seed} must be from 0 to 2**63 - 1")


def own_question(run: Run, prompt: str, system: str | None) -> Question:
    """A question of the user's, in the form that the run was trained on; `system` stands before it
    or, if that is None, the run's own system prompt."""
    if system is None and "systems" in run.provenance["data"]:
        print(f"note: the run's questions began with {run.provenance['data']['systems']} different "
              "system prompts; none stands before this one, --system=... names it")
    try:
        return Question(prompt, prompt_of(run, prompt, system), None)
    except ValueError as error:
        fail(str(error))


def held_out_questions(run: Run, args: Args) -> list[Question]:
    """The first questions of validation, with the right answers."""
    trained_on = run.provenance["data"]
    data = load_data(relocated(run.config, args.data_dir), run.tokenizer)
    if not same_split(data.provenance, trained_on):
        print(f"note: the run saw other data, or another split of it ({trained_on['dataset']} from "
              f"{trained_on['source']}); these questions may not be held out")
    pairs, decode = data.pairs["val"], run.tokenizer.decode
    return [Question(decode(pairs.question(e)), pairs.prompt(e), decode(pairs.answer(e)))
            for e in range(min(args.num_samples, len(pairs)))]  # fmt: skip


# --- question after question ------------------------------------------------------------------


def converse(run: Run, args: Args, system: str | None, autocast) -> None:
    """Answer questions as they are asked, until there are no more."""
    in_terminal = sys.stdin is not None and sys.stdin.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives input() its arrow keys
    while True:
        try:
            text = input("> " if in_terminal else "")
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no input at all
            print(end="\n" if in_terminal else "")
            return
        if not text.strip():
            continue
        if not in_terminal:
            print(f"> {text}")  # as it stands in a terminal
        try:
            print_answer(run, args, own_question(run, text, system).prompt, autocast)
        except KeyboardInterrupt:
            print(" [stopped]")
        except SystemExit:  # a line has said why this cannot be asked
            continue
        if system is None and "systems" in run.provenance["data"]:
            system = ""  # the same, but the note on it is said once


def print_answer(run: Run, args: Args, prompt: list[int], autocast) -> None:
    """Print an answer while it is written. Half a character is decoded as a �, so what ends in one
    waits; so does a text that decodes otherwise than it began."""
    ids, printed, decode, eot = [], "", run.tokenizer.decode, run.tokenizer.eot
    steps = generate_steps(run.model, [prompt], args.max_new_tokens, eot, args.sampling)
    with autocast(), contextlib.closing(steps):
        for _, tokens in steps:
            ids += tokens.tolist()
            text = decode(ids).rstrip("\ufffd")
            if text.startswith(printed):
                print(text[len(printed) :], end="", flush=True)
                printed = text
    text = decode(ids)
    rest = text[len(printed) :] if text.startswith(printed) else f"\n{text}"
    print(rest + ("" if ids[-1] == eot else CUT_OFF))


if __name__ == "__main__":
    run_main(main)
