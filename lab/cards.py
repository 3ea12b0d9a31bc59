"""What demo.py's page says, as HTML: the words, the cards, the drawing of the mask, the looks.

Text that a visitor, a model or a data set wrote is escaped here, wherever it stands.
"""

import shlex
from html import escape
from typing import NamedTuple

from alignment import verdict
from lab.draw_mask import BLOCKS, Token, row_of, shortened
from run import Run
from views import tokenize

DRAWN = 10  # tokens of a block in the drawing of the mask

TITLES = {
    "guess": ("1", "The guess", "before a word is written"),
    "answer": ("2", "The answer", "token by token"),
    "plain": ("3", "Without JEPA", "the same question at λ = 0"),
    "mask": ("4", "Who sees what", "in the row of this question, as training has it"),
    "run": ("5", "This run", "and whether its embeddings have collapsed"),
}
VERDICTS = {  # of alignment.verdict
    "aligned": "They have not collapsed: a guess lies near its own answer and far from others.",
    "partly aligned": "They have not collapsed, but wrong answers still lie rather near a guess.",
    "collapsed": "They have collapsed: wrong answers lie as near a guess as the right one does, so "
                 "a high cosine says nothing here.",
    "not aligned": "They have not met: a guess does not even lie near its own answer.",
    "of one answer only": "That cannot be told: all held-out pairs have one and the same answer.",
    "not finite": "That cannot be told: they are no numbers any more.",
}  # fmt: skip
DOUBTS = {
    "collapsed": "The embeddings of this run have collapsed: every answer lies near every guess.",
    "not aligned": "In this run a guess does not lie near its own answer, so it says little.",
}


class Places(NamedTuple):
    """HTML for the five places of the page that a question changes."""

    said: str
    guess: str
    answer: str
    plain: str
    mask: str


class Guess(NamedTuple):
    """What Pred says of a question."""

    near: list[tuple[float, str]]  # cosine and text of the nearest known answers
    usual: float  # cosine of an average known answer
    known: str  # a sentence on the known answers
    doubt: str  # why the guess is not to be trusted, or empty


def card(place: str, html: str) -> str:
    number, title, rest = TITLES[place]
    return (f'<section class="card {place}"><h2><i>{number}</i> {title} <small>{rest}</small></h2>'
            f"{html}</section>")  # fmt: skip


def sentence(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def code(text: str) -> str:
    text = text if len(text) <= 200 else f"{text[:200]} …"
    return f"<code>{escape(text)}</code>" if text.strip() else "<em>(nothing)</em>"


def bar(cosine: float, text: str, note: str = "") -> str:
    """A line of a list: a cosine as a number and as a length, and what has it."""
    return (f'<li><b>{cosine:.3f}</b><span class=bar><i style="width:{100 * max(cosine, 0):.0f}%">'
            f"</i></span><span>{code(text)} <em>{note}</em></span></li>")  # fmt: skip


def at_first(run: Run, baseline: Run | None, no_guess: str) -> Places:
    """Before anything is asked. `no_guess` is a sentence on why there is no guess, or empty."""
    guess = (f"{no_guess} The model answers all the same." if no_guess else
             "Which known answers lie nearest to it? They stand here before a word is written.")
    plain = how_to_compare(run) if baseline is None else sentence(
        f"Here {baseline.name} answers as well. It was trained without JEPA.")
    answer, mask = "It appears here.", "It is drawn when the answer is finished."
    return Places("", card("guess", sentence(guess)), card("answer", sentence(answer)),
                  card("plain", plain), card("mask", sentence(mask)))  # fmt: skip


def how_to_compare(run: Run) -> str:
    if not run.config.jepa_weight:
        return sentence("The run that you ask is itself one at λ = 0: there is nothing to compare.")
    words = [word for word in shlex.split(run.provenance["command"])
             if not word.startswith(("--out_dir", "--init_from", "--jepa_weight"))]  # fmt: skip
    command = shlex.join(["python", "train.py", *words, "--jepa_weight=0",
                          f"--out_dir={run.path.parent}-baseline"])  # fmt: skip
    return (sentence("No run at λ = 0 and otherwise the same lies beside this one. This trains it:")
            + f"<pre>{escape(command)}</pre>")  # fmt: skip


def where_from(run: Run, split: str, sure: bool) -> str:
    """Does the data hold the question, and what stands before it? Not `sure`: the run was trained
    with another split of it."""
    systems = run.provenance["data"].get("systems")
    mixed = (f" In training, {systems} different system prompts stood before the questions; none "
             "stands before this one.") if systems else ""  # fmt: skip
    if split == "train":
        return f"{run.name} was trained on this very question, and may know the answer by heart."
    if split and not sure:
        return (f"The data holds this question ({split}), but {run.name} was trained with another "
                "split of it, perhaps on this very question.")  # fmt: skip
    if split:
        return f"This is a held-out question ({split}): {run.name} was not trained on it."
    return f"This question is yours: the data of {run.name} does not hold it.{mixed}"


def guess_card(
    guess: Guess, right: str = "", answer: str | None = None, cosine: float | None = None
) -> str:
    """The guess; at the end with the finished answer and its cosine, None if it has none."""
    def note(text):
        return " and ".join(said for said, other in (("the right answer", right or None),
                                                     ("what it wrote", answer)) if text == other)

    lines = "".join(bar(*known, note(known[1])) for known in guess.near)
    html = (sentence(guess.doubt, "no") + "<p>The known answers that lie nearest to it, by cosine:"
            f"</p><ul>{lines}</ul>"
            + sentence(f"An average known answer has {guess.usual:.3f}. {guess.known}", "aside"))
    if cosine is not None:
        html += ("<p>The answer is written. This is how near it came to the guess:</p>"
                 f"<ul class=end>{bar(cosine, answer)}</ul>")  # fmt: skip
    return card("guess", html)


def counted(n_tokens: int) -> str:
    return f"{n_tokens} token{'s' * (n_tokens > 1)}"


def growing_card(place: str, text: str, before: str, so_far: str) -> str:
    """An answer so far; `before` is what stood there without its newest token."""
    before = before if text.startswith(before) else ""  # a character may take several tokens
    return card(place, f"<pre>{escape(before)}<mark>{escape(text[len(before) :])}</mark></pre>"
                       + sentence(so_far, "aside"))  # fmt: skip


def answer_card(place: str, text: str, ended: str, right: str, scores: dict[str, bool]) -> str:
    """A finished answer and, for a question of the data, the right one."""
    html = f"<pre>{escape(text) or '<em>(nothing)</em>'}</pre>{sentence(ended, 'aside')}"
    if right and text == right:
        html += "<p>That is <b>right</b>, to the letter.</p>"
    elif right:
        is_right = scores["exact"] or scores.get("equivalent")
        word = "right, though written otherwise" if is_right else "not right"
        html += f"<p>That is <b>{word}</b>. The right answer is:</p><pre>{escape(right)}</pre>"
    return card(place, html)


def mask_card(run: Run, question: str, answer: str) -> str:
    """The row that question and answer make, as training packs it, and who sees whom in it."""
    config, tokenizer, V = run.config, run.tokenizer, run.tokenizer.vocab_size
    system = run.provenance["data"].get("system", "")
    row = {"text": question, "code": answer, "system": system, "target": ""}
    pairs, _ = tokenize([row], tokenizer, config)
    if not len(pairs):
        return card("mask", sentence("Not drawn: with this answer the row is longer than the "
                                     f"context of {config.block_size} tokens."))  # fmt: skip

    def word_of(i: int) -> str:
        if i >= V or i == tokenizer.eot:
            return "[PRED]" if i >= V else "<eot>"
        text = tokenizer.decode([i]).replace("\n", "⏎")
        return text.strip() or ("␣" if text else "<sep>" if tokenizer.name != "hf" else "<mark>")

    whole, mask = row_of(pairs, 0, word_of)
    tokens, mask = shortened(whole, mask, DRAWN)
    said = "Each line is a token, and the coloured squares are the tokens that it may see."
    if len(tokens) < len(whole):
        said += (f" The row has {len(whole)} tokens, too many to read: {len(tokens)} are drawn, "
                 "the first and the last of each block, with … at the gaps.")  # fmt: skip
    if not config.jepa_weight:
        said += " At λ = 0 training leaves out [PRED] and the answer that stands alone."
    return card("mask", f"{sentence(said)}<div class=wide>{mask_table(tokens, mask.tolist())}"
                        f"<ul>{who_sees_whom(tokens, mask.tolist())}</ul></div>")  # fmt: skip


def mask_table(tokens: list[Token], mask: list[list[bool]]) -> str:
    """A line for each token, with a square for each that there is, coloured where it is seen."""
    head = "".join(f'<th class="b{t.block}"><span>{escape(t.word)}</span></th>' for t in tokens)
    lines = []
    for token, sees in zip(tokens, mask):
        cells = "".join(f'<td class="b{other.block if seen else 0}"><i></i></td>'
                        for other, seen in zip(tokens, sees))  # fmt: skip
        label = f"predicts {escape(token.label)} " if token.label else ""
        lines.append(f'<tr class="b{token.block}"><th>{escape(token.word)}</th>{cells}'
                     f"<th>{label}<b>{token.read}</b></th></tr>")  # fmt: skip
    return f"<table><tr><th></th>{head}<th></th></tr>{''.join(lines)}</table>"


def who_sees_whom(tokens: list[Token], mask: list[list[bool]]) -> str:
    """The same in words, a line for each block."""
    seen = {}
    for token, sees in zip(tokens, mask):
        seen[token.block] = {other.block for other, is_seen in zip(tokens, sees) if is_seen}
    names = {b: f'<b class="b{b}">{BLOCKS[b][1]}</b>' for b in seen}
    return "".join(
        f"<li>{names[b]} sees "
        + (" and ".join(names[other] for other in seen if other in others - {b}) or "itself alone")
        + "</li>" for b, others in seen.items())


def run_card(run: Run, measures: dict[str, float]) -> str:
    """Have the embeddings collapsed, by the last evaluation, and what is the run made of?"""
    m, data, config = measures, run.provenance["data"], run.config
    html = sentence("No evaluation of this run is written down, so nothing says if it collapsed.")
    if m:
        chance = f" (by chance {m['chance']:.3f})" if "chance" in m else ""
        rows = [
            ("matched", f"{m['matched']:.2f}", "mean cosine of a guess with its own answer"),
            ("mismatched", f"{m['mismatched']:.2f}", "mean cosine with the answers of others"),
            ("retrieval@1", f"{m['retrieval_at_1']:.2f}",
             f"share of guesses to which no other answer is as near as their own{chance}"),
            ("effective ranks", f"{m['effective_rank_pred']:.0f} and "
             f"{m['effective_rank_target']:.0f}", "directions that guesses and answers use"),
        ]  # fmt: skip
        lines = "".join(f"<tr><th>{name}</th><td><b>{value}</b></td><td>{means}</td></tr>"
                        for name, value, means in rows)  # fmt: skip
        html = (f"<p><b>Embeddings: {verdict(m)}.</b> {VERDICTS[verdict(m)]}</p><table>{lines}"
                f"</table><p class=aside>On held-out pairs, after {m['step']} steps.</p>")
    facts = [str(run.path), f"step {run.step}", f"λ = {config.jepa_weight:g}",
             f"{data['train_rows']:,} pairs of {data['dataset']} from {data['source']}",
             f"sha256 {data['train_sha256'][:12]}",
             f"commit {run.provenance.get('commit', 'unknown')}"]  # fmt: skip
    facts += [f"trunk {run.model.about['name']}"] if run.model.about else []
    return card("run", html + sentence(" · ".join(facts), "aside"))


def intro(run: Run) -> str:
    n, k = sum(p.numel() for p in run.model.parameters()), run.config.n_pred
    more = f" and {k} tokens more, [PRED]," if k > 1 else " and one token more, [PRED]," * k
    plan = run.config.layout == "plan"
    apart = ("The answer is written behind [PRED], so it may use the guess." if plan else
             "The answer is written without a look at the guess: both come from one network.")
    pred = "<b class=b4>[PRED]</b> → " * (k > 0)
    return (
        "<header><div><h1>A guess before the first word</h1>"
        f"<p>You ask <code>{escape(run.name)}</code>, a language model of {n / 1e6:.1f} million "
        f"weights. When it has read your question{more} it holds a vector: its <b>guess at the "
        "whole answer</b>, before a word of it is written.</p><p>The page shows which known "
        f"answers lie nearest to the guess, then the answer, and at last how near it came. {apart} "
        "Near means a high cosine: 1 is the same direction, 0 has nothing in common.</p></div>"
        f"<div class=flow><p><b class=b1>your question</b> → {pred}the guess, one vector</p>"
        f"<p><b class=b1>your question</b> → {pred * plan}<b class=b2>the answer</b> → word by word"
        "</p></div></header>"
    )


CSS = """
footer {display: none !important}
header {display: flex; flex-wrap: wrap; gap: 1rem 4rem; align-items: center; line-height: 1.6}
header > div {flex: 1 1 24rem} header h1 {font-size: 2rem; font-weight: 650; margin: 0 0 .4em}
header p {margin: 0 0 .6em !important} .html-container {padding: 0 !important}
.flow b, .wide li b {background: var(--block); color: #fff !important; border-radius: 5px;
  padding: .15em .7em; font-weight: 500; white-space: nowrap}
#beside {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr))}
#beside > *, #beside .html-container, #beside .prose {height: 100%; min-width: 0}
.card {border: 1px solid #8883; border-top: 4px solid var(--tone); border-radius: 8px;
  padding: 1rem 1.2rem; height: 100%; line-height: 1.5; overflow-wrap: anywhere}
.card h2 {font-size: 1.05rem; margin: 0 0 .6em} .card h2 i {color: var(--tone); font-style: normal}
.card h2 small {font-weight: 400; opacity: .7} .card p {margin: .5em 0}
.guess {--tone: #c8553d} .answer {--tone: #588157} .plain, .run {--tone: #8a8f98}
.mask {--tone: #2a6f97} .aside {font-size: .85em; opacity: .75} .no {color: #c8553d}
.card pre {white-space: pre-wrap; font-family: ui-monospace, monospace; margin: .5em 0;
  background: #8881; padding: .6em .8em; border-radius: 6px; font-size: .95em}
.card code {font-family: ui-monospace, monospace; font-size: .9em; background: none; padding: 0}
.card mark {background: #58815755; color: inherit; border-radius: 3px}
.card ul {list-style: none; padding: 0; margin: .5em 0}
.card li {display: grid; grid-template-columns: 3.2em 4em 1fr; gap: .6em; margin: .35em 0}
.bar {background: #8882; height: .7em; margin-top: .45em} .bar, .bar i {border-radius: 4px}
.bar i {display: block; height: 100%; background: #c8553d} .end .bar i {background: #588157}
.card em {color: #588157; font-size: .85em}
.wide {overflow-x: auto; display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: center}
.wide li {display: block; font-size: .9em; margin: .7em 0}
.card table, .card tr, .card th, .card td {border: 0 !important; width: auto; text-align: left}
.run th, .run td {padding: .15em 1.5em .15em 0; font-weight: inherit}
.run th, .run td b {white-space: nowrap}
.mask table {border-collapse: collapse} .mask td, .mask th {padding: 0 1px; font-size: .75rem;
  white-space: pre; line-height: 1; font-weight: 500; color: var(--block); vertical-align: bottom}
.mask th:first-child {text-align: right; padding-right: 6px} .mask th:last-child {padding-left: 8px}
.mask th span {writing-mode: vertical-rl; transform: rotate(180deg); display: inline-block}
.mask th * {color: inherit}
.mask td i {display: block; width: 15px; height: 15px; border-radius: 2px;
  background: var(--block)} .b0 {--block: #8882}
""" + " ".join(f".b{b} {{--block: {color}}}" for b, (_, _, color) in BLOCKS.items())
