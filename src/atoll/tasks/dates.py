"""Two built-in tasks about dates: `dates` (infer a date from a story, choose among options) and `date_format` (write a date as YYYY-MM-DD).

Every answer comes from `datetime`: a story fixes today, a question moves from it. Wrong options are the mistakes people make (wrong direction, a day
off, day and month swapped) beside dates that are plainly elsewhere. The right letter is drawn evenly.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable
from datetime import date, timedelta

from atoll.tasks.drawing import Draw, Generator, Row, phrases, sentence
from atoll.tasks.vocabulary import CITIES, COMPANY_STEMS, COUNTED_THINGS, FIRST_NAMES, MONTHS, ORDINAL_WORDS, SHOP_ITEMS, WEEKDAYS, ordinal

LETTERS = ("(A)", "(B)", "(C)", "(D)", "(E)", "(F)")
YEARS = tuple(range(1905, 2045))  # every fourth one held out, never a leap year

# The story names a date that lies this many days after today.
STORIES: tuple[tuple[int, str], ...] = (
    (0, "Today is {date}."),
    (0, "It is {date} today."),
    (-1, "Yesterday was {date}."),
    (0, "The calendar on the wall of {name} says {date}, and it is right."),
    (1, "Tomorrow is {date}."),
    (-2, "The day before yesterday was {date}."),
    (2, "The deadline is {date}, which is 2 days away from now."),
    (1, "The meeting of {name} was moved to 11 am tomorrow, {date}."),
    (-1, "Yesterday, {date}, {name} bought {number} {things}."),
    (0, "Today, {date}, is a day that {name} will never forget."),
    (2, "The day after tomorrow is {date}."),
    (-7, "{name} moved house exactly one week ago, on {date}."),
    (0, "{name} thinks today is {other}, but {name2} thinks it is {date}. {name2} is right."),
    (3, "The library book of {name} is due on {date}, in 3 days."),
    (-3, "{name} arrived in {city} on {date}. That was three days ago."),
    (-10, "{name} lost {number} {things} on {date}, ten days ago."),
    (7, "In exactly one week, on {date}, {name} flies to {city}."),
    (5, "{name} will be back in 5 days, on {date}."),
    (-14, "The course began two weeks ago, on {date}."),
    (1, "{name} bakes a cake today because the party is tomorrow, {date}."),
    (0, "{name} signs a letter with today's date: {date}."),
    (10, "The concert on {date} is 10 days away."),
    (-5, "{name} has been in {city} for 5 days, since {date}."),
    (-2, "Two days ago, on {date}, it rained all day in {city}."),
)

# What is asked: words, and how to get there from today.
QUESTIONS: tuple[tuple[str, Callable[[date], date | None]], ...] = (
    ("today", lambda today: today),
    ("yesterday", lambda today: today - timedelta(1)),
    ("tomorrow", lambda today: today + timedelta(1)),
    ("24 hours later", lambda today: today + timedelta(1)),
    ("one week ago from today", lambda today: today - timedelta(7)),
    ("one week from today", lambda today: today + timedelta(7)),
    ("10 days ago", lambda today: today - timedelta(10)),
    ("two weeks from today", lambda today: today + timedelta(14)),
    ("a month ago", lambda today: shifted_months(today, -1)),
    ("one year ago from today", lambda today: shifted_months(today, -12)),
    ("3 days from now", lambda today: today + timedelta(3)),
    ("one month from today", lambda today: shifted_months(today, 1)),
    ("on the first day of next month", lambda today: shifted_months(today.replace(day=1), 1)),
    ("10 days from now", lambda today: today + timedelta(10)),
    ("on the last day of this month", lambda today: today.replace(day=calendar.monthrange(today.year, today.month)[1])),
    ("the day before yesterday", lambda today: today - timedelta(2)),
)

HOLIDAYS = (("Christmas Eve", 12, 24), ("New Year's Day", 1, 1), ("Valentine's Day", 2, 14), ("Christmas Day", 12, 25), ("New Year's Eve", 12, 31))
HOLIDAY_STORIES = phrases("Today is {holiday} of {year}. / {name} is getting ready for {holiday} of {year}, which is today.")
MONTH_END_STORIES = phrases("""
    {name} is celebrating the last day of {month} {year}. / Today is the last day of {month} {year}.
    This is the last day of {month} in {year}, and {name} pays the rent.
    The {month} {year} sale that {name} waits for ends today, on the last day of the month.""")
WEEKDAY_STORIES = phrases("""
    Today is the {nth} {weekday} of {month} {year}. / {name} sees the dentist today, on the {nth} {weekday} of {month} {year}.
    It is the {nth} {weekday} of {month} {year}, market day in {city}. / The club of {name} meets today, the {nth} {weekday} of {month} {year}.""")
ANNIVERSARY_STORIES = phrases("""
    {name} was born on {date}. Today is the {nth} birthday of {name}. / {name} and {name2} married on {date}. Today is their {n}-year anniversary.
    {name} started to work in {city} on {date}. Today is exactly {n} years later. / The bridge of {city} opened on {date}, {n} years ago today.""")
DAYS_STORIES = phrases("""
    {name} quit a job on {date}. {n} days have passed since then. / On {date} {name} bought milk that keeps for {n} days. Today is its last day.
    {name} planted a tree on {date}, {n} days ago. / {name} began a diary on {date} and has kept it for {n} days since.""")
BRITISH_STORIES = phrases("""
    In the UK, people put the day before the month. Therefore, today is {british} to them.
    {name} in London writes today's date day first: {british}.
    A British letter that was written today carries the date {british}, day first. / With the day before the month, today is {british} for {name}.""")
LEAP_STORIES = phrases("""
    Today is the last day of February {year}. / {name} was born on the last day of February. Today, in {year}, is the birthday of {name}.
    {year}: {name} writes "last day of February" on top of the page today. / It is the day before March 1, {year}.""")


def shifted_months(day: date, months: int) -> date | None:
    """The same day `months` later, or None when that month has no such day."""
    years, month0 = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(years, month0 + 1, day.day) if day.day <= calendar.monthrange(years, month0 + 1)[1] else None


def american(day: date) -> str:
    return f"{day.month:02}/{day.day:02}/{day.year}"


def spoken_date(draw: Draw, day: date) -> str:
    """`day` in one of the ways that leave no doubt to an American reader."""
    month = MONTHS[day.month - 1]
    return draw.any(
        (f"{month[:3]} {day.day}, {day.year}", f"{month} {day.day}, {day.year}", f"{day.month}/{day.day}/{day.year}", american(day),
         f"{day.day} {month} {day.year}", f"{month} {ordinal(day.day)}, {day.year}")
    )  # fmt: skip


def random_day(draw: Draw) -> date:
    year, month = draw.pick(YEARS), draw.integer(1, 12)
    return date(year, month, draw.integer(1, calendar.monthrange(year, month)[1]))


def _told(draw: Draw) -> tuple[str, date]:
    """A story that names a day near today."""
    today = random_day(draw)
    offset, story = draw.pick(STORIES)
    named = today + timedelta(offset)
    other = named + timedelta(draw.any((-1, 1)))
    slots = {"date": spoken_date(draw, named), "other": spoken_date(draw, other), "name": FIRST_NAMES, "city": CITIES, "things": COUNTED_THINGS}
    return draw.say(story, {**slots, "number": str(draw.integer(2, 30))}), today


def _holiday(draw: Draw) -> tuple[str, date]:
    holiday, month, day = draw.any(HOLIDAYS)
    year = draw.pick(YEARS)
    return draw.say(draw.pick(HOLIDAY_STORIES), {"holiday": holiday, "year": str(year), "name": FIRST_NAMES}), date(year, month, day)


def _month_end(draw: Draw) -> tuple[str, date]:
    year, month = draw.pick(YEARS), draw.integer(1, 12)
    story = draw.say(draw.pick(MONTH_END_STORIES), {"name": FIRST_NAMES, "month": MONTHS[month - 1][: draw.any((3, 9))], "year": str(year)})
    return story, date(year, month, calendar.monthrange(year, month)[1])


def _weekday(draw: Draw) -> tuple[str, date]:
    year, month, weekday, nth = draw.pick(YEARS), draw.integer(1, 12), draw.integer(0, 6), draw.integer(1, 4)
    first = date(year, month, 1)
    today = first + timedelta((weekday - first.weekday()) % 7 + 7 * (nth - 1))
    slots = {"nth": ORDINAL_WORDS[nth - 1], "weekday": WEEKDAYS[weekday], "month": MONTHS[month - 1], "year": str(year), "name": FIRST_NAMES}
    return draw.say(draw.pick(WEEKDAY_STORIES), {**slots, "city": CITIES}), today


def _anniversary(draw: Draw) -> tuple[str, date]:
    start = random_day(draw)
    start = start.replace(day=min(start.day, 28))  # February 29 has no anniversary in most years
    years = draw.integer(2, 30)
    slots = {"name": FIRST_NAMES, "city": CITIES, "date": spoken_date(draw, start), "n": str(years), "nth": ordinal(years)}
    return draw.say(draw.pick(ANNIVERSARY_STORIES), slots), start.replace(year=start.year + years)


def _days_passed(draw: Draw) -> tuple[str, date]:
    start, days = random_day(draw), draw.any((5, 10, 20, 30, 45, 60, 100))
    return draw.say(draw.pick(DAYS_STORIES), {"name": FIRST_NAMES, "date": spoken_date(draw, start), "n": str(days)}), start + timedelta(days)


def _british(draw: Draw) -> tuple[str, date]:
    today = random_day(draw)
    today = today.replace(day=min(today.day, 12))  # ambiguous on purpose
    return draw.say(draw.pick(BRITISH_STORIES), {"british": f"{today.day:02}/{today.month:02}/{today.year}", "name": FIRST_NAMES}), today


def _leap(draw: Draw) -> tuple[str, date]:
    year = draw.any([year for year in YEARS if calendar.isleap(year)] + list(YEARS[::8]))
    return draw.say(draw.pick(LEAP_STORIES), {"year": str(year), "name": FIRST_NAMES}), date(year, 3, 1) - timedelta(1)


def _wrong_options(draw: Draw, answer: date, today: date) -> list[date]:
    """Five other dates: two near mistakes, three further away."""
    near = [answer + timedelta(1), answer - timedelta(1), today, today - (answer - today), answer + timedelta(10), answer - timedelta(7)]
    if answer.day <= 12:
        near.append(date(answer.year, answer.day, answer.month))
    wrong: list[date] = []
    while len(wrong) < 5:
        if len(wrong) < 2:
            other = draw.any(near)
        elif draw.chance(0.5):
            other = date(answer.year, draw.integer(1, 12), draw.integer(1, 28))
        else:
            other = answer.replace(day=min(answer.day, 28), year=answer.year + draw.any((-1, 1)) * draw.integer(1, 60))
        if other != answer and other not in wrong:
            wrong.append(other)
    return wrong


def dates_row(draw: Draw, letter: str) -> Row:
    """One question whose right option stands at `letter`."""
    tell = draw.any((_told, _told, _told, _told, _told, _holiday, _month_end, _weekday, _anniversary, _days_passed, _british, _leap))
    answer = None
    while answer is None:
        story, today = tell(draw)
        asked, move = draw.any(QUESTIONS)
        answer = move(today)
    options = draw.shuffled(_wrong_options(draw, answer, today))
    options.insert(LETTERS.index(letter), answer)
    listed = "\n".join(f"{mark} {american(option)}" for mark, option in zip(LETTERS, options, strict=True))
    question = f"{sentence(story)} What is the date {asked} in MM/DD/YYYY?"
    return {"question": question, "options": listed, "answer": letter, "date": answer.isoformat()}


DATE_SENTENCES = phrases("""
    The lease of {name} ends on {date}. / {name} was born on {date} in {city}. / Please pay invoice {number} by {date}.
    Your flight to {city} leaves on {date}.
    The warranty of the {item} expires {date}. / We received your letter of {date}. / {company} opened its {city} office on {date}.
    Dentist for {name}: {date}, room {small}.
    The exam takes place on {date} in hall {small}. / Order {number} was shipped on {date}. / From {date} the shop in {city} opens at {small}.
    {name} has booked {small} nights from {date}.
    Minutes of the meeting held {date} in {city}. / The contract with {company} was signed on {date}.
    Tickets for {date} are sold out; {number} were printed. / Date of purchase: {date} ({item}).
    Deliver the {small} {item} boxes before {date}, please. / On {date} {name} ran the marathon of {city}. / Due {date}: report {number}.
    {name}, hired {date}, works in {city}.
    The road to {city} stays closed until {date}. / Photo taken by {name} on {date}. / Last backup: {date}, {number} files.
    {date} is the day {name} moves to {city}.""")


def _plain(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


# Ways to write a date; those at places 4, 8, 12, ... occur in validation and test only and are made of familiar pieces.
DATE_FORMATS: tuple[Callable[[date], str], ...] = (
    _plain,
    lambda day: f"{MONTHS[day.month - 1]} {day.day}, {day.year}",
    lambda day: f"{MONTHS[day.month - 1][:3]} {ordinal(day.day)}, {day.year}",
    lambda day: f"{day.day} {MONTHS[day.month - 1][:3]} {day.year}",
    lambda day: f"{day.month}/{day.day}/{day.year}",
    lambda day: f"{day.day}.{day.month}.{day.year}",
    lambda day: f"the {ordinal(day.day)} of {MONTHS[day.month - 1]} {day.year}",
    lambda day: f"{WEEKDAYS[day.weekday()]} the {ordinal(day.day)} of {MONTHS[day.month - 1]}, {day.year}",
    lambda day: f"{day.day}-{MONTHS[day.month - 1][:3]}-{day.year}",
    lambda day: f"{WEEKDAYS[day.weekday()]}, {_plain(day)}",
    lambda day: f"the {ORDINAL_WORDS[day.day - 1]} of {MONTHS[day.month - 1]} {day.year}",
    lambda day: f"{MONTHS[day.month - 1]} the {ORDINAL_WORDS[day.day - 1]}, {day.year}",
    lambda day: f"{day.year}/{day.month}/{day.day}",
    lambda day: f"{day.month:02}/{day.day:02}/{day.year}",
    lambda day: f"{day.day:02}.{day.month:02}.{day.year}",
    lambda day: f"{MONTHS[day.month - 1][:3]}. {day.day}, {day.year}",
)


def date_format_row(draw: Draw, month: str) -> Row:
    """One sentence with a date in `month`."""
    year, number = draw.pick(YEARS), MONTHS.index(month) + 1
    day = date(year, number, draw.integer(1, calendar.monthrange(year, number)[1]))
    slots = {"name": FIRST_NAMES, "city": CITIES, "item": SHOP_ITEMS, "company": COMPANY_STEMS, "date": draw.pick(DATE_FORMATS)(day)}
    numbers = {"number": str(draw.integer(100, 9999)), "small": str(draw.integer(2, 19))}
    return {"text": sentence(draw.say(draw.pick(DATE_SENTENCES), {**slots, **numbers})), "iso": day.isoformat()}


def generators() -> tuple[Generator, ...]:
    """`dates` and `date_format`."""
    dates = {
        "name": "dates",
        "title": "Infer a date from a short story, six options",
        "family": "multiple-choice",
        "fields": {
            "question": "a story and a question (input)",
            "options": "six dates (input)",
            "answer": "the letter (target)",
            "date": "the right date",
        },
        "input_fields": ["question", "options"],
        "target": "answer",
        "label_set": list(LETTERS),
        "metric": "accuracy",
        "instruction": "Infer the date from context.",
        "template": "Q: {question}\nOptions:\n{options}\nA:",
        "notes": "In the manner of date understanding in BIG-Bench Hard. A twelfth of the rows is ambiguous but for the story (day before month).",
    }
    date_format = {
        "name": "date_format",
        "title": "Write the date in a sentence as YYYY-MM-DD",
        "family": "extraction",
        "fields": {"text": "a sentence with one date (input)", "iso": "the date as YYYY-MM-DD (target)"},
        "input_fields": ["text"],
        "target": "iso",
        "metric": "exact_match",
        "instruction": "Write the date in the text as YYYY-MM-DD. With slashes the month comes before the day, with dots the day comes first.",
        "template": "Text: {text}\nDate:",
        "target_format": "YYYY-MM-DD",
        "notes": "Four of sixteen ways to write a date occur in validation and test only.",
    }
    return Generator(dates, LETTERS, dates_row, ("question",)), Generator(date_format, MONTHS, date_format_row, ("text",))
