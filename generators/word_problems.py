"""
Word problems in the form of GSM8K, questions and worked answers, for when it cannot be had:

    Grace sold 96 mugs in June and half as many in July. How many mugs did Grace sell ...?

    Grace sold 96/2 = <<96/2=48>>48 mugs in July.
    Together this makes 96+48 = <<96+48=144>>144 mugs.
    #### 144

This is not GSM8K, and results on it must not be called so: a few dozen templates filled with
random names and numbers are far easier than 8,792 problems that people thought up.
"""

import random
import re


class Draw:
    """All chance of a generator. Built on random() alone, the one method of random.Random whose
    sequence Python promises to keep: a seed means the same rows everywhere and for good."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def int(self, lo, hi):
        """A whole number from lo to hi, both included."""
        return lo + int(self.random() * (hi - lo + 1))

    def pick(self, pool):
        """One element of a sequence."""
        return pool[int(self.random() * len(pool))]

    def some(self, pool, k):
        """A list of k different elements of a sequence."""
        pool = list(pool)
        return [pool.pop(int(self.random() * len(pool))) for _ in range(k)]

    def person(self):
        """A first name with its pronouns: ("Anna", "she", "her") or ("Omar", "he", "his")."""
        name = self.pick(NAMES)
        return (name, "she", "her") if name in WOMEN else (name, "he", "his")


# ---- word problems ---------------------------------------------------------------------------
# A template draws its numbers and returns a text: one question, up to the question mark, then
# one sentence a step. [a*b] stands for a*b = <<a*b=c>>c and [$a*b] for a*b = $<<a*b=c>>c; the
# results are calculated, never typed. Draw backwards (first the result of a division, then what
# is divided) so that all comes out whole, and keep counts above one so that plurals are right.

WOMEN = ("Anna", "Maya", "Natalia", "Grace", "Chloe", "Leila", "Sofia", "Ruth", "Emma", "Nora",
         "Priya", "Mei", "Clara", "Zoe", "Fatima", "Lucy", "Ingrid", "Rosa", "Aisha", "Yuki")
MEN = ("Omar", "Ben", "Carlos", "Daniel", "Ethan", "Felix", "George", "Hugo", "Ivan", "Jamal",
       "Kenji", "Liam", "Marco", "Noah", "Oscar", "Paul", "Ravi", "Sam", "Victor", "Yusuf")
NAMES = WOMEN + MEN
MONTHS = ("March", "April", "May", "June", "July", "August", "September", "October", "November")
CRAFTS = ("clips", "candles", "scarves", "postcards", "bracelets", "mugs", "kites", "baskets")
SMALL = ("marbles", "stickers", "stamps", "shells", "coins", "cards", "buttons", "badges", "beads")
FRUIT = ("apples", "pears", "plums", "peaches", "lemons", "oranges", "figs", "cherries", "mangoes")
PAPER = ("notebooks", "pens", "rulers", "folders", "markers", "erasers", "envelopes", "brushes")
BAKED = ("pancakes", "muffins", "cookies", "waffles", "scones", "buns", "pretzels", "dumplings")
WEAR = ("jacket", "sweater", "dress", "coat", "pair of boots", "backpack", "suit", "raincoat")
HOBBIES = ("plays the violin", "plays chess", "draws", "studies French", "walks the dog", "swims")
JOBS = (("fold", "shirts"), ("pack", "parcels"), ("peel", "potatoes"), ("plant", "seedlings"),
        ("wash", "windows"), ("fill", "bottles"), ("wrap", "presents"), ("paint", "boards"))
GROUPS = (("choir", "boys", "girls", "singers"), ("shelter", "cats", "dogs", "animals"),
          ("pond", "frogs", "ducks", "animals"), ("orchard", "pear trees", "fig trees", "trees"))


def half_as_many(r):
    a, things, n, m = r.pick(NAMES), r.pick(CRAFTS), 2 * r.int(12, 80), r.int(0, 7)
    return f"""{a} sold {n} {things} in {MONTHS[m]} and half as many in {MONTHS[m + 1]}. How many
    {things} did {a} sell in the two months together?
    {a} sold [{n}/2] {things} in {MONTHS[m + 1]}. Together this makes [{n}+{n // 2}] {things}."""

def change(r):
    (a, she, _), (x, y), p, q = r.person(), r.some(PAPER, 2), r.int(2, 7), r.int(2, 7)
    n, m = r.int(2, 6), r.int(2, 6)
    bill = r.pick([b for b in (20, 50, 100) if b > n * p + m * q])
    return f"""{a} buys {n} {x} at ${p} each and {m} {y} at ${q} each. At the till {she} pays with
    a ${bill} bill. How much change does {she} get?
    The {x} cost [${n}*{p}]. The {y} cost [${m}*{q}]. The change is [${bill}-{n * p}-{m * q}]."""

def harvest(r):
    (a, she, _), fruit, k, each = r.person(), r.pick(FRUIT), r.int(3, 9), r.int(4, 15)
    n = r.int(5, k * each - 5)
    return f"""{a} picked {n} {fruit} in the morning and {k * each - n} more in the afternoon. Then
    {she} shared them all equally among {k} neighbors. How many {fruit} did each neighbor get?
    {a} picked [{n}+{k * each - n}] {fruit}. Each neighbor got [{k * each}/{k}] {fruit}."""

def two_leg_trip(r):
    (a, she, _), s, t, (u, v) = r.person(), r.int(2, 6), r.int(2, 6), r.some(range(24, 72, 2), 2)
    return f"""{a} drives for {s} hours at {u} miles an hour. After a break {she} drives for
    another {t} hours at {v} miles an hour. How many miles does {she} drive in total?
    Before the break, {a} drives [{s}*{u}] miles. After the break, {she} drives [{t}*{v}] miles.
    In total, {a} drives [{s * u}+{t * v}] miles."""

def discount(r):
    (a, she, _), thing, p, d = r.person(), r.pick(WEAR), 20 * r.int(2, 15), 5 * r.int(1, 10)
    return f"""{a} wants a {thing} that normally costs ${p}. This week the store takes {d}% off the
    price. How much does {she} pay for the {thing} this week?
    The discount is [${p}*{d}/100]. So {she} pays [${p}-{p * d // 100}]."""

def ages(r):
    (a, b), k, n, y = r.some(NAMES, 2), r.int(2, 5), r.int(4, 14), r.int(3, 15)
    return f"""{b} is {n} years old, and {a} is {k} times as old as {b}. What will be the sum of
    their ages in {y} years?
    {a} is now [{k}*{n}] years old. In {y} years, {a} will be [{k * n}+{y}] years old. {b} will
    then be [{n}+{y}] years old. The sum of their ages will be [{k * n + y}+{n + y}] years."""

def ways_to_school(r):
    a, d, q = r.pick(NAMES), r.int(3, 6), r.int(4, 50)
    n, walk = 2 * d * q, 2 * q
    return f"""{a}'s school has {n} students. 1/{d} of them walk to school, half of the others take
    the bus, and the rest come by bike. How many students come by bike?
    [{n}/{d}] students walk. That leaves [{n}-{walk}] students. Half of these take the bus, so
    the other [{n - walk}/2] students come by bike."""

def overtime(r):
    (a, she, _), base, extra = r.person(), r.pick((30, 32, 35, 36, 38, 40)), r.int(2, 12)
    p, q = r.int(10, 24), r.int(25, 36)
    return f"""{a} earns ${p} an hour for the first {base} hours of a week and ${q} for every hour
    after that. Last week {she} worked {base + extra} hours. How much did {she} earn?
    {a} worked [{base + extra}-{base}] hours extra. The first {base} hours paid [${base}*{p}]. The
    extra hours paid [${extra}*{q}]. In all, {a} earned [${base * p}+{extra * q}]."""

def scaled_recipe(r):
    (a, she, her), things, stuff = r.person(), r.pick(BAKED), r.pick(("flour", "sugar", "butter"))
    (n, m), grams = r.some(range(4, 25), 2), r.int(5, 30)
    return f"""A recipe for {n} {things} calls for {n * grams} grams of {stuff}. {a} wants to make
    {m} {things} for {her} family. How many grams of {stuff} does {she} need?
    Each of the {n} takes [{n * grams}/{n}] grams. So {a} needs [{m}*{grams}] grams of {stuff}."""

def saving_up(r):
    (a, she, _), has, s, w = r.person(), r.int(10, 60), r.int(4, 15), r.int(5, 20)
    gift = r.pick(("a bicycle", "a guitar", "a telescope", "a pair of skates", "a camera"))
    return f"""{a} wants to buy {gift} that costs ${has + s * w}. So far {she} has ${has}, and
    {she} can save ${s} every week. In how many weeks will {she} have enough?
    {a} still needs [${has + s * w}-{has}]. Saving this much takes [{s * w}/{s}] weeks."""

def fence(r):
    a, w, more, p = r.pick(NAMES), r.int(5, 20), r.int(2, 15), r.int(3, 15)
    return f"""{a} has a rectangular garden. It is {w} meters wide and {more} meters longer than it
    is wide. A fence costs ${p} a meter. How much does it cost to fence the whole garden?
    The garden is [{w}+{more}] meters long. The fence has to be [2*({w}+{w + more})] meters long.
    It costs [${2 * (2 * w + more)}*{p}]."""

def average(r):
    a, m, d, e, f = r.pick(NAMES), r.int(15, 40), r.int(1, 9), r.int(1, 9), r.int(1, 5)
    game, w, x, y, z = r.pick(("darts", "trivia", "bowling")), m - d, m + e, m - f, m + d + f - e
    return f"""In 4 {game} games {a} scored {w}, {x}, {y} and {z} points. What was {a}'s average
    score per game?
    {a} scored [{w}+{x}+{y}+{z}] points in all. The average is [{4 * m}/4] points per game."""

def ratio(r):
    a, (place, x, y, both), unit = r.pick(NAMES), r.pick(GROUPS), r.int(2, 30)
    p, q = r.pick(((2, 3), (3, 4), (3, 5), (2, 5), (4, 5), (5, 7), (2, 7), (3, 8), (4, 7), (5, 6)))
    return f"""In {a}'s {place} there are only {x} and {y}, in the ratio {p}:{q}. There are
    {(p + q) * unit} {both} altogether. How many {y} are there? The ratio has [{p}+{q}] parts. Each
    part stands for [{(p + q) * unit}/{p + q}] {both}. So there are [{q}*{unit}] {y}."""

def three_collections(r):
    (a, b, c), things, n, k = r.some(NAMES, 3), r.pick(SMALL), r.int(6, 40), r.int(2, 5)
    m = r.int(2, k * n - 2)
    return f"""{a} has {n} {things}. {b} has {k} times as many as {a}, and {c} has {m} fewer than
    {b}. How many {things} do the three of them have together?
    {b} has [{k}*{n}] {things}. {c} has [{k * n}-{m}] {things}. Together they have
    [{n}+{k * n}+{k * n - m}] {things}."""

def practice_hours(r):
    a, does, m, w = r.pick(NAMES), r.pick(HOBBIES), 15 * r.int(1, 6), r.int(2, 12)
    return f"""{a} {does} for {m} minutes every day. How many hours is that in {w} weeks?
    A week makes [7*{m}] minutes. {w} weeks make [{w}*{7 * m}] minutes. These are
    [{w * 7 * m}/60] hours."""

def eggs(r):
    (a, she, her), d, k, p = r.person(), r.int(2, 12), r.int(3, 11), r.int(2, 6)
    return f"""The hens on {a}'s farm lay {12 * d + k} eggs a day. Every day {she} keeps {k} eggs
    for {her} family and sells the others at ${p} a dozen. How much does {she} earn in a week?
    {a} sells [{12 * d + k}-{k}] eggs a day. That is [{12 * d}/12] dozen. A day brings in
    [${d}*{p}]. In a week, {a} earns [$7*{d * p}]."""

def leaking_tank(r):
    what, leak, net = r.pick(("tank", "pool", "barrel", "pond")), r.int(2, 9), r.int(4, 40)
    full = net * r.int(5, 60)
    return f"""An empty {what} holds {full} liters. A pump brings in {net + leak} liters of water a
    minute, but {leak} liters a minute leak out again. After how many minutes is the {what} full?
    The {what} gains [{net + leak}-{leak}] liters a minute. It takes [{full}/{net}] minutes."""

def working_together(r):
    (a, b), (do, things), (x, y) = r.some(NAMES, 2), r.pick(JOBS), r.some(range(6, 30), 2)
    n = (x + y) * r.int(2, 12)
    return f"""{a} can {do} {x} {things} in an hour, and {b} can {do} {y}. How many hours do they
    need to {do} {n} {things} if they work together?
    Together they {do} [{x}+{y}] {things} in an hour. So they need [{n}/{x + y}] hours."""

def lemonade_stand(r):
    (a, she, _), p, n = r.person(), r.pick((0.5, 0.75, 1.25, 1.5, 1.75, 2.5)), 4 * r.int(6, 30)
    drink, cost = r.pick(("lemonade", "iced tea", "apple juice", "cocoa")), r.int(4, n // 2 - 4)
    return f"""{a} spends ${cost} on what {she} needs for a stand and then sells {n} cups of
    {drink} at ${p:.2f} a cup. What is {a}'s profit?
    {a} takes in [${n}*{p}]. The profit is [${n * p:g}-{cost}]."""

def rope(r):
    (a, she, _), rest, m, c = r.person(), r.int(3, 40), r.int(2, 15), r.pick((10, 20, 25, 50))
    what, use = r.pick((("rope", "a swing"), ("ribbon", "a big bow"), ("string", "a kite")))
    return f"""{a} has {rest + m} meters of {what}. After using {m} meters for {use}, {she} cuts
    the rest into pieces of {c} centimeters. How many pieces does {she} get?
    The rest is [{rest + m}-{m}] meters. These are [{rest}*100] centimeters. So {she} gets
    [{rest * 100}/{c}] pieces."""

def lawn_seed(r):
    a, x, y, p, s = r.pick(NAMES), 5 * r.int(6, 15), 4 * r.int(2, 7), r.int(3, 9), r.pick((10, 20))
    return f"""{a} wants to sow grass on a field that is {x} meters long and {y} meters wide. A bag
    of seed costs ${p} and is enough for {s} square meters. How much does the seed cost?
    The field has [{x}*{y}] square meters. {a} needs [{x * y}/{s}] bags. These cost
    [${x * y // s}*{p}]."""

def boxes(r):
    a, things, k, n = r.pick(NAMES), r.pick(PAPER + CRAFTS), r.int(3, 25), r.int(6, 48)
    return f"""{a}'s store gets a delivery of {k} boxes with {n} {things} in each box. How many
    {things} is that? The store gets [{k}*{n}] {things}."""

def given_away(r):
    (a, b), things, left, m = r.some(NAMES, 2), r.pick(SMALL + FRUIT), r.int(3, 60), r.int(3, 40)
    return f"""{a} had {left + m} {things} and gave {m} of them to {b}. How many {things} does {a}
    have left? {a} has [{left + m}-{m}] {things} left."""

def bake_sale(r):
    a, (x, y, z), (k, m, n) = r.pick(NAMES), r.some(BAKED, 3), r.some(range(10, 40), 3)
    (p, q), cost = r.some((2, 3, 4, 5), 2), r.int(10, 50)
    return f"""At a bake sale, {a}'s class sells {k} {x} at ${p} each, {m} {y} at ${q} each and {n}
    {z} at $1 each. The ingredients cost ${cost}. How much money does the class make?
    The {x} bring in [${k}*{p}]. The {y} bring in [${m}*{q}]. The {z} bring in [${n}*1]. Together
    this is [${k * p}+{m * q}+{n}]. The class makes [${k * p + m * q + n}-{cost}]."""

def training_plan(r):
    (a, she, _), n, d = r.person(), r.int(5, 40), r.int(2, 9)
    does, what = r.pick((("swims", "laps"), ("does", "push-ups"), ("does", "squats")))
    return f"""On Monday {a} {does} {n} {what}. Each day after that {she} {does} {d} more than the
    day before. How many {what} is that from Monday to Thursday?
    On Tuesday, {a} {does} [{n}+{d}] {what}. On Wednesday, {she} {does} [{n + d}+{d}] {what}.
    On Thursday, {she} {does} [{n + 2 * d}+{d}] {what}. From Monday to Thursday that is
    [{n}+{n + d}+{n + 2 * d}+{n + 3 * d}] {what}."""

def class_trip(r):
    place, p = r.pick(("zoo", "museum", "aquarium", "circus", "castle")), 10 * r.int(8, 40)
    k, seats, t = r.int(2, 9), r.int(20, 55), r.int(3, 12)
    return f"""{k * seats - t} students and {t} teachers go to the {place} by bus. Each bus has
    {seats} seats and costs ${p}, and no seat stays empty. How much do the buses cost?
    [{k * seats - t}+{t}] people go. They fill [{k * seats}/{seats}] buses. They pay [${k}*{p}]."""

def restaurant(r):
    (a, _, her), k, i, tip = r.person(), r.int(3, 8), r.int(4, 25), r.pick((5, 10, 15, 20, 25))
    bill, extra = 4 * k * i, 4 * k * i * tip / 100
    return f"""{a} goes to a restaurant with {her} friends. There are {k} people in all, and the
    bill is ${bill}. They add a tip of {tip}% and split everything equally. How much does each pay?
    The tip is [${bill}*{tip}/100]. Together they pay [${bill}+{extra:g}]. Each of them pays
    [${bill + extra:g}/{k}]."""

def legs(r):
    a, n, m = r.pick(NAMES), r.int(3, 40), r.int(3, 40)
    x, p, y, q, of = r.pick((("tables", 4, "stools", 3, "legs"), ("carts", 4, "bikes", 2, "wheels"),
                             ("benches", 6, "chairs", 4, "legs")))
    return f"""{a}'s workshop builds {n} {x} with {p} {of} each and {m} {y} with {q} {of} each. How
    many {of} are needed?
    The {x} need [{n}*{p}] {of}. The {y} need [{m}*{q}]. This makes [{n * p}+{m * q}] {of}."""

def steady_ride(r):
    a, ride, t, v = r.pick(NAMES), r.pick(("bus", "train", "boat")), r.int(2, 9), r.int(20, 70)
    return f"""{a}'s {ride} takes {t} hours to go {t * v} kilometers at a steady speed. How many
    kilometers does it go in an hour? In an hour, the {ride} goes [{t * v}/{t}] kilometers."""

def fuel(r):
    (a, _, her), g, k, p = r.person(), r.int(10, 25), r.int(3, 30), r.pick((1.2, 1.5, 1.75, 1.8))
    who = r.pick(("grandmother", "brother", "best friend", "uncle", "parents"))
    return f"""{a} drives {g * k} kilometers to see {her} {who} and then the same way home. The car
    goes {g} kilometers on a liter of gas, and a liter costs ${p:.2f}. How much does the gas cost?
    There and back, {a} drives [2*{g * k}] kilometers. The car uses [{2 * g * k}/{g}] liters. The
    gas costs [${2 * k}*{p}]."""

def faulty_goods(r):
    a, things, n, h = r.pick(NAMES), r.pick(SMALL + CRAFTS), 20 * r.int(3, 25), r.int(4, 16)
    bad = r.pick((5, 10, 15, 20))
    return f"""{a}'s factory makes {n} {things} an hour and runs {h} hours a day. {bad}% of the
    {things} are faulty. How many good {things} does the factory make in a day?
    The factory makes [{n}*{h}] {things} a day. [{n * h}*{bad}/100] of them are faulty. So it makes
    [{n * h}-{n * h * bad // 100}] good {things} a day."""

def needed_score(r):
    (a, she, her), m, d, e = r.person(), r.int(75, 88), r.int(1, 9), r.int(-7, 3)
    subject = r.pick(("math", "history", "biology", "Spanish", "music", "geography"))
    return f"""{a} scored {m - d} and {m - e} points on {her} first two {subject} tests. How many
    points does {she} need on the next test for an average of {m} over all 3 tests?
    For this average, {a} needs [3*{m}] points in total. So far {she} has [{m - d}+{m - e}] points.
    On the next test, {she} needs [{3 * m}-{2 * m - d - e}] points."""

def shelves(r):
    (a, _, her), k, n = r.person(), r.int(3, 15), r.int(6, 40)
    things = r.pick(("books", "jars", "records", "toys", "plants"))
    return f"""{a} puts {her} {k * n} {things} on {k} shelves, with the same number on every shelf.
    How many {things} are on each shelf? There are [{k * n}/{k}] {things} on each shelf."""

def party(r):
    (a, she, _), n, p, m, q = r.person(), r.int(2, 9), r.int(2, 6), r.int(2, 9), r.int(2, 6)
    x, y = r.some(("packs of balloons", "bottles of juice", "bags of candy", "paper crowns"), 2)
    cake, off = r.int(12, 40), r.int(5, 15)
    total = n * p + m * q + cake
    return f"""For a party {a} buys {n} {x} at ${p} each, {m} {y} at ${q} each and a cake for
    ${cake}. A coupon takes ${off} off, and {she} pays with $200. How much does {she} get back?
    The {x} cost [${n}*{p}]. The {y} cost [${m}*{q}]. With the cake that makes
    [${n * p}+{m * q}+{cake}]. After the coupon, {a} owes [${total}-{off}]. So {she} gets
    [$200-{total - off}] back."""


# Disjoint, so that val and test tell stories that training never told; each has easy and hard.
TEMPLATES = {
    "train": (half_as_many, change, harvest, two_leg_trip, discount, ages, ways_to_school, overtime,
              scaled_recipe, saving_up, fence, average, ratio, three_collections, practice_hours,
              eggs, leaking_tank, working_together, lemonade_stand, rope, lawn_seed, boxes,
              given_away, bake_sale),
    "val": (training_plan, class_trip, restaurant, legs, steady_ride),
    "test": (fuel, faulty_goods, needed_score, shelves, party),
}


def fill(template, r):
    """One row {"question", "answer"} of a template, its steps calculated.

    Raises ValueError if a result is zero, negative or has more than two decimals."""
    question, steps = " ".join(template(r).split()).split("? ")
    lines = []
    for step in re.split(r"(?<=\.) ", steps):  # sentences; no space follows the point of 1.5
        before, dollar, expr, after = re.fullmatch(r"(.*)\[(\$?)(.*)\](.*)", step).groups()
        value = eval(expr)  # expr is our own: numbers and + - * / ( ) of the templates above
        if value <= 0 or abs(100 * value - round(100 * value)) > 1e-6:
            raise ValueError(f"{template.__name__}: {expr} = {value} is no natural quantity")
        result = f"{value:.2f}".rstrip("0").rstrip(".")  # 24.00 -> 24 and 0.50 -> 0.5
        lines.append(f"{before}{expr} = {dollar}<<{expr}={result}>>{result}{after}")
    return {"question": question + "?", "answer": "\n".join([*lines, f"#### {result}"])}


def word_problems(split: str, n_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """n_rows rows {"question", "answer"} of a split: "train", "val" or "test".

    The same arguments give the same rows on every machine, and more rows begin with the same
    rows as fewer. Raises ValueError for an unknown split or a negative n_rows."""
    if split not in TEMPLATES:
        raise ValueError(f"unknown split {split!r}: must be one of {', '.join(TEMPLATES)}")
    if n_rows < 0:
        raise ValueError(f"n_rows is {n_rows}: must be 0 or more")
    r = Draw(f"word problems, {split}, {seed}")
    return [fill(r.pick(TEMPLATES[split]), r) for _ in range(n_rows)]


def word_problem_rows(name: str = "word_problems") -> dict[str, list[dict[str, str]]]:
    """The data set, of GSM8K's size; its splits share no template."""
    sizes = {"train": 7473, "val": 512, "test": 1319}
    return {split: word_problems(split, n) for split, n in sizes.items()}
