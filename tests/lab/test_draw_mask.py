"""Claims about lab/draw_mask.py: the text equals drawings by hand, and there is a figure."""

from pathlib import Path

import pytest
import torch
from conftest import error_line

from lab import draw_mask
from lab.draw_mask import Token, shortened
from views import PRED, TARGET, TEXT

# Letter, mask, position, label and what is read: two plus three ? <sep>, five <eot>.
TREE = """
  two      q  1 . . . . . . . . .     0
  plus     q  1 1 . . . . . . . .     1
  three    q  1 1 1 . . . . . . .     2
  ?        q  1 1 1 1 . . . . . .     3
  <sep>    q  1 1 1 1 1 . . . . .     4  five
  five     a  1 1 1 1 1 1 . . . .     5  <eot>
  <eot>    a  1 1 1 1 1 1 1 . . .     6
  [PRED0]  P  1 1 1 1 1 . . 1 . .     5  Pred is read here
  five     t  . . . . . . . . 1 .     0
  <eot>    t  . . . . . . . . 1 1     1  Enc is read here
"""
PLAN = """
  two      q  1 . . . . . . . . .     0
  plus     q  1 1 . . . . . . . .     1
  three    q  1 1 1 . . . . . . .     2
  ?        q  1 1 1 1 . . . . . .     3
  <sep>    q  1 1 1 1 1 . . . . .     4
  [PRED0]  P  1 1 1 1 1 1 . . . .     5  five Pred is read here
  five     a  1 1 1 1 1 1 1 . . .     6  <eot>
  <eot>    a  1 1 1 1 1 1 1 1 . .     7
  five     t  . . . . . . . . 1 .     0
  <eot>    t  . . . . . . . . 1 1     1  Enc is read here
"""
ISOLATED = """
  two      q  1 . . . . . . . .     0
  plus     q  1 1 . . . . . . .     1
  three    q  1 1 1 . . . . . .     2
  ?        q  1 1 1 1 . . . . .     3
  <sep>    q  1 1 1 1 1 . . . .     4
  [PRED0]  P  1 1 1 1 1 1 . . .     5
  [PRED1]  P  1 1 1 1 1 1 1 . .     6  Pred is read here
  five     a  . . . . . . . 1 .     0  <eot>
  <eot>    a  . . . . . . . 1 1     1  Enc is read here
"""
TUBE = """
  two      q  1 . . . . . .     0        -rest
  plus     q  1 1 . . . . .     1        -patch +rest
  three    q  1 1 1 . . . .     2
  ?        q  1 1 1 1 . . .     3        +patch
  <sep>    q  1 1 1 1 1 . .     4  five  -rest
  five     a  1 1 1 1 1 1 .     5  <eot> +rest
  <eot>    a  1 1 1 1 1 1 1     6
"""
OVER = """
  two      q  1 . . . . . .     0        -rest
  plus     q  1 1 . . . . .     1        -patch +rest
  three    q  1 1 1 . . . .     2
  ?        q  1 1 1 1 . . .     3        +patch
  <sep>    q  1 1 1 1 1 . .     4  five  -patch
  five     a  1 1 1 1 1 1 .     5  <eot> +patch
  <eot>    a  1 1 1 1 1 1 1     6
"""
TWO_VIEWS = """
  two      q  1 . . . . . .     0        -patch
  plus     q  1 1 . . . . .     1
  three    q  1 1 1 . . . .     2
  ?        q  1 1 1 1 . . .     3        +patch
  <sep>    q  1 1 1 1 1 . .     4  five  -rest
  five     a  1 1 1 1 1 1 .     5  <eot> +rest
  <eot>    a  1 1 1 1 1 1 1     6
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options, drawing", [
    ([], TREE), (["--layout=plan"], PLAN), (["--layout=isolated", "--n_pred=2"], ISOLATED),
    (["--pooling=mean"], TREE.replace("Enc is read here", "Enc is the mean of this block")),
    # Every token of the question but the first is a label, too.
    (["--labels=all"], TREE.replace("0\n  plus", "0  plus\n  plus").replace("1\n  three", (
        "1  three\n  three")).replace("2\n  ?", "2  ?\n  ?").replace("3\n  <sep>", (
            "3  <sep>\n  <sep>"))),
    (["--objective=tube", "--n_pred=0", "--seed=1"], TUBE),
    (["--objective=tube", "--n_pred=0", "--seed=9"], OVER),
    (["--objective=tube_two_views", "--n_pred=0"], TWO_VIEWS),
])  # fmt: skip
def test_the_text_equals_the_one_drawn_by_hand(options, drawing, here, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(draw_mask, "draw", lambda *args: shown.append(args))
    monkeypatch.setattr(draw_mask, "write_figure", lambda path, figure: None)
    draw_mask.main(options)
    header, *lines, wrote = capsys.readouterr().out.splitlines()
    wanted = drawing.strip("\n").splitlines()
    assert [line.split() for line in lines] == [line.split() for line in wanted]
    letters = [line.split()[1] for line in wanted]
    assert header.split() == [*letters, "pos", "label"]
    # Each letter stands over its column.
    first = lines[0].index(" 1 ") + 1
    assert [header[first + 2 * i] for i in range(len(letters))] == letters
    assert wrote == "wrote out/mask.png"
    [(tokens, mask)] = shown  # the figure shows what the text does
    assert [token.word for token in tokens] == [line.split()[0] for line in wanted]
    cells = [line.split()[2 : 2 + len(wanted)] for line in wanted]
    assert mask.tolist() == [[cell == "1" for cell in row] for row in cells]


def test_the_figure_is_written_and_names_every_block(here, monkeypatch):
    figures, real = [], draw_mask.draw
    monkeypatch.setattr(draw_mask, "draw", lambda *args: figures.append(real(*args)) or figures[-1])
    draw_mask.main(["--layout=front"])
    assert Path("out/mask.png").stat().st_size > 10_000
    monkeypatch.setattr(draw_mask, "write_figure", lambda path, figure: None)  # a second each
    draw_mask.main([])
    names = ["question again", "question", "answer", "[PRED]", "answer again"]
    for figure, wanted in zip(figures, (names, names[1:])):
        [legend] = figure.legends
        assert sorted(text.get_text() for text in legend.get_texts()) == sorted(wanted)


def test_a_row_may_be_shortened_within_its_blocks():
    """Of six tokens of a block the first one and the last two are left, and who sees whom."""
    tokens = [Token(word, block, i, "", "") for i, (word, block) in enumerate(
        [*zip("abcdef", [TEXT] * 6), ("P", PRED), ("x", TARGET), ("y", TARGET)])]  # fmt: skip
    mask = torch.rand(9, 9) > 0.5
    short, seen = shortened(tokens, mask, 3)
    assert [token.word for token in short] == ["a …", "e", "f", "P", "x", "y"]
    assert [token.position for token in short] == (kept := [0, 4, 5, 6, 7, 8])
    assert seen.tolist() == [[mask[i, j].item() for j in kept] for i in kept]
    assert shortened(tokens, mask, 6)[0] == tokens


def test_a_mistake_is_one_line(here, capsys):
    assert "layout='ring'" in error_line(capsys, draw_mask.main, ["--layout=ring"])
