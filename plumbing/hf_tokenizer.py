"""The tokenizer of a pretrained model, and how its template frames a question and its answer.

    read_tokenizer(tokenizer, template, V)  of a transformers tokenizer
    HFTokenizer(dumped)                     the same out of a checkpoint; needs no transformers

`plain`: the token that begins a text, if the tokenizer puts one, the question, a line end, the
answer, end of text. `chat`: what the model's own template writes around a user's and an
assistant's message; the answer ends in the template's end of turn. Special tokens are the
template's alone: in a question or an answer their names are plain text.
"""

import hashlib
import json
from datetime import datetime
from unittest.mock import patch

from config import fail

NEEDS = "a pretrained trunk needs {}: pip install -r requirements-hf.txt"
try:
    import tokenizers
except ImportError:
    fail(NEEDS.format("transformers"))

# For a template that prints the date: the same on every day.
TODAY = type("Pinned", (datetime,), {"now": classmethod(lambda cls: cls(2024, 7, 26))})
SYSTEM, USER, ANSWER = "\ue000system\ue001", "\ue000user\ue001", "\ue000answer\ue001"


class HFTokenizer:
    """A plumbing.tokenizers.Tokenizer."""

    name = "hf"

    def __init__(self, dumped: str):
        about = json.loads(dumped)
        self.dumped, self.sha256 = dumped, hashlib.sha256(dumped.encode()).hexdigest()
        self.eot, self.vocab_size = about["eot"], about["vocab_size"]
        self.bpe = tokenizers.Tokenizer.from_str(about["tokenizer"])
        self.bpe.no_padding()
        self.bpe.no_truncation()
        self.size = self.bpe.get_vocab_size()
        # Around the views, without and with a system prompt: see parts_of.
        self.parts = [[self.bpe.encode(part, add_special_tokens=False).ids for part in parts]
                      for parts in about["parts"]]  # fmt: skip
        self.bpe.encode_special_tokens = True  # from here on <|im_end|> is ten letters

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self.bpe.encode_batch_fast(texts, add_special_tokens=False)
        return [each.ids for each in encoded]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode([i for i in ids if i < self.vocab_size and i != self.eot])

    def frame(self, system: str) -> tuple[list[int], list[int], list[int]]:
        opening, before, after, alone = self.parts[bool(system)]
        said = self.encode([system])[0] if system else []
        return [*opening, *said, *before], after, alone

    def dump(self) -> str:
        return self.dumped


def read_tokenizer(tokenizer, template: str, vocab_size: int, name: str) -> HFTokenizer:
    """Of what AutoTokenizer gives for the model called `name`, which has vocab_size embeddings."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        fail(f"the tokenizer of {name} ({type(tokenizer).__name__}) is none of the tokenizers "
             "library, so special tokens in a text could not be told from its own")
    if len(tokenizer) > vocab_size:
        fail(f"the tokenizer of {name} has {len(tokenizer)} tokens and its model {vocab_size} "
             "embeddings: they do not belong together")
    if template == "chat":
        parts, end = chat_parts(tokenizer, name)
    else:
        ids = tokenizer("a").input_ids
        begins = ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
        bos = tokenizer.bos_token if begins else ""
        parts, end = [[bos, "", "\n", bos], [bos, "\n", "\n", bos]], ""
    ends = tokenizer(end, add_special_tokens=False).input_ids if end else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    eot = next((i for i in ends if i in special), tokenizer.eos_token_id)
    if eot is None:
        fail(f"the tokenizer of {name} has no end mark (eos_token), so no answer could end")
    return HFTokenizer(json.dumps({
        "tokenizer": tokenizer.backend_tokenizer.to_str(), "parts": parts, "eot": eot,
        "vocab_size": vocab_size,
    }))  # fmt: skip


def chat_parts(tokenizer, name: str) -> tuple[list[list[str]], str]:
    """What the model's template puts before a system prompt, between it and the question, between
    question and answer, and before an answer alone, without and with a system prompt; and what it
    puts after an answer."""
    template = tokenizer.chat_template
    if not template:
        fail(f"{name} has no chat template; --template=plain asks it without one")
    if "strftime_now" in str(template) or "date_string" in str(template):
        print(f"the chat template of {name} prints the date: here it is always "
              f"{TODAY.now():%d %b %Y}")

    def render(*said):
        messages = [{"role": role, "content": content} for role, content in said]
        with patch("transformers.utils.chat_template_utils.datetime", TODAY):
            return tokenizer.apply_chat_template(messages, tokenize=False)

    try:
        whole, asked = render(("user", USER), ("assistant", ANSWER)), render(("user", USER))
        before, _, rest = whole.partition(USER)
        after, found, end = rest.partition(ANSWER)
    except Exception as error:  # the template is a program of its own
        fail(f"the chat template of {name} does not run: {error}".splitlines()[0])
    if not found:
        fail(f"the chat template of {name} does not print what user and assistant say")
    header = after.removeprefix(asked.partition(USER)[2])  # what begins the assistant's turn
    bos = tokenizer.bos_token or ""
    alone = (bos if bos and before.startswith(bos) else "") + header
    try:
        opening, found, between = render(("system", SYSTEM), ("user", USER)).partition(SYSTEM)
        between = between.partition(USER)[0]
    except Exception:  # it knows no system prompts
        found = ""
    if not found:  # then they stand before the question, in the user's turn
        opening, between = before, "\n"
    return [[before, "", after, alone], [opening, between, after, alone]], end
