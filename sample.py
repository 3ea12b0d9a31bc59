"""Ask a trained model: held-out questions with its answers, or a question of your own.

    python sample.py                            the newest run, three validation questions
    python sample.py out/gsm8k_jepa --prompt="..." --num_samples=2
"""

import math
from dataclasses import dataclass
from pathlib import Path

from config import fail, moved, parse_args
from data import load_data
from run import exit_quietly, load_run, pick_device, runs_newest_first
from views import pred_tokens, system_tokens


@dataclass(frozen=True)
class Args:
    # what to ask
    prompt: str = ""  # a question; empty asks held-out ones from the validation split
    num_samples: int = 3  # held-out questions, or answers to the prompt
    # how to answer
    max_new_tokens: int = 256  # at most; the context may end earlier
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 50  # draw among the k likeliest tokens; 0 is all
    top_p: float = 1.0  # draw among the likeliest tokens whose probability reaches p
    seed: int = 1337  # the same seed gives the same answers
    # where
    data_dir: str = ""  # folder of the data, if it is no longer where the run found it
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16


def main(argv: list[str]) -> None:
    values, runs = parse_args(Args, argv, "python sample.py [RUN] [--key=value ...]")
    args = Args(**values)
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
    device, autocast = pick_device(args.device, args.dtype)
    run = load_run(Path(runs[0]) if runs else runs_newest_first()[0], device)
    trained_on = run.provenance["data"]
    print(f"run {run.path}, step {run.step}, trained on {trained_on['dataset']}")

    tokenizer = run.tokenizer
    text = args.prompt
    if text and tokenizer.name == "words":
        words = [f" {word}" for word in text.split()]
        if not words or any(word.encode() not in tokenizer.ranks for word in words):
            fail(f"prompt={text!r} must be words that {run.path} knows, such as 'a3 b4 r2'")
        text = "".join(words)
    if text:
        # Running text and facts go on without an end mark.
        prompt = tokenizer.encode([text])[0]
        if run.config.views in ("pairs", "steps"):
            system = system_tokens([trained_on], tokenizer, run.config)[0]
            prompt = system + prompt + [tokenizer.sep]
        prompts = [prompt + pred_tokens(run.config, tokenizer.vocab_size)] * args.num_samples
        questions, answers = [args.prompt] * args.num_samples, [None] * args.num_samples
    else:
        data = load_data(moved(run.config, args.data_dir), tokenizer)
        if data.provenance["train_sha256"] != trained_on["train_sha256"]:
            print(f"note: the run saw other data ({trained_on['dataset']} from "
                  f"{trained_on['source']}); these questions may not be held out")
        held_out = data.pairs["val"]
        rows = range(min(args.num_samples, len(held_out)))
        prompts = [held_out.prompt(row) for row in rows]
        questions = [tokenizer.decode(held_out.question(row)) for row in rows]
        answers = [tokenizer.decode(held_out.answer(row)) for row in rows]
    room = run.config.block_size - 1
    if len(prompts[0]) > room and args.prompt:
        fail(f"the prompt has {len(prompts[0])} tokens, its end mark included; the context of "
             f"{run.path} leaves room for {room}")

    with autocast():
        outputs = run.model.generate(
            prompts, args.max_new_tokens, tokenizer.eot, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, seed=args.seed,
        )  # fmt: skip
    for question, answer, output in zip(questions, answers, outputs):
        ended = "" if output[-1] == tokenizer.eot else " [cut off: no end of text]"
        print(f"\n--- question\n{question}\n--- {run.name} answers\n"
              f"{tokenizer.decode(output)}{ended}")
        if answer is not None:
            print(f"--- right answer\n{answer}")


if __name__ == "__main__":
    exit_quietly(main)
