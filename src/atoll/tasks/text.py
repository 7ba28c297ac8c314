"""Two built-in tasks that write sentences: `data_to_text` (a record into prose) and `review_explained` (a label with its reason, as JSON).

`data_to_text` says the same record in several wordings: one is the training target, all are references in validation and test. In
`review_explained` the reason is a clause of the review, so a model has to find it among sentences that judge nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from atoll.tasks.drawing import Draw, Generator, Row, Slots, phrases, sentence, words
from atoll.tasks.vocabulary import CITIES, COMPANY_STEMS, FIRST_NAMES, LAST_NAMES, WEEKDAYS

STREETS = words("""
    Mill Lane, Harbour Street, Oak Road, Station Way, Park Row, Bridge Street, Church Hill, Market Square, River Walk, Elm Court, Castle Road,
    Garden Close, Tower
    Street, Abbey Lane, Canal Side, North Terrace, School Road, Cherry Avenue, Linden Row, Quarry Road""")
HIKE_NAMES = words("""
    Falcon Ridge, Moss Valley, Echo Lake, Three Bridges, Heron Marsh, Granite Loop, Fern Hollow, Old Mill Path, Cedar Pass, Sunrise Point,
    Wolf Creek, Pebble Coast,
    Thistle Hill, Lantern Cave, Birch Trail, Silver Falls, Raven Crag, Willow Bend, Amber Cliffs, Juniper Way""")
MODEL_NAMES = words("""
    Kite S, Lumo 3, Orbit Mini, Pixelo, Nova Two, Tern X, Vela Pro, Arc 5, Fable, Comet Air, Quartz, Dune 9, Ember, Iris Plus, Sable, Zephyr,
    Onyx 2, Plume, Sonar, Twig""")
DEVICE_TYPES = words("phone, tablet, laptop, camera, speaker, watch")
COURSES = words("""
    Pottery, Bread Baking, First Aid, Spanish for Beginners, Bookkeeping, Web Design, Beekeeping, Chess, Life Drawing, Sewing, Photography,
    Gardening, Public
    Speaking, Guitar, Algebra, Bicycle Repair, Watercolour, Yoga, Creative Writing, Woodwork""")
BOATS = words("""
    Aurora, Sea Heron, Polar Star, Meridian, Gull, Northern Light, Cormorant, Estrella, Kingfisher, Osprey, Albatross, Morning Tide,
    Petrel, Sirius, Triton,
    Halcyon""")


@dataclass(frozen=True)
class Domain:
    """Records of one kind: main fields with their values, four wordings of these, and fields that may be missing, with two wordings a value."""

    kind: str
    values: Slots
    wordings: tuple[str, ...]
    optional: dict[str, dict[str, tuple[str, str]]]


def _whole(low: int, high: int, unit: str = "", step: int = 1) -> Callable[[Draw], str]:
    """Draws a whole number with its unit."""
    return lambda draw: f"{step * draw.integer(low, high)}{unit}"


def _teacher(draw: Draw) -> str:
    return f"{draw.pick(FIRST_NAMES)} {draw.pick(LAST_NAMES)}"


def _address(draw: Draw) -> str:
    return f"{draw.pick(STREETS)} {draw.integer(1, 60)}"


@cache
def domains() -> tuple[Domain, ...]:
    """The kinds of records; the fourth occurs in validation and test only."""
    return (
        Domain(
            "apartment",
            {"address": _address, "city": CITIES, "rooms": _whole(2, 7), "rent": _whole(40, 320, " dollars", 10)},
            phrases("""
                The apartment at {address} in {city} has {rooms} rooms and costs {rent} a month.
                In {city}, at {address}, there is an apartment with {rooms} rooms for {rent} a month.
                For {rent} a month you can rent an apartment with {rooms} rooms at {address} in {city}.
                This apartment with {rooms} rooms is at {address}, {city}, and its rent is {rent} a month."""),
            {
                "pets": {"yes": ("Pets are welcome.", "You may keep pets."), "no": ("Pets are not allowed.", "You may not keep pets.")},
                "balcony": {"yes": ("It has a balcony.", "There is a balcony."), "no": ("It has no balcony.", "There is no balcony.")},
                "parking": {"garage": ("It has a garage.", "There is a garage."), "street": ("You can park on the street.", "Park on the street.")},
            },
        ),
        Domain(
            "hike",
            {"name": HIKE_NAMES, "near": CITIES, "length": _whole(3, 38, " km"), "climb": _whole(3, 90, " m", 20)},
            phrases("""
                {name} is a hike of {length} near {near} with a climb of {climb}. / The {name} hike near {near} is {length} long and climbs {climb}.
                Near {near} you can hike {name}, which is {length} long and climbs {climb}.
                With a length of {length} and a climb of {climb}, {name} is a hike near {near}."""),
            {
                "difficulty": {level: (f"It is {level}.", f"The trail is {level}.") for level in ("easy", "moderate", "hard")},
                "season": {time: (f"It is best in {time}.", f"The best time is {time}.") for time in ("spring", "summer", "autumn")},
                "dogs": {"yes": ("Dogs are allowed.", "You may bring a dog."), "no": ("Dogs are not allowed.", "You may not bring a dog.")},
            },
        ),
        Domain(
            "device",
            {"name": MODEL_NAMES, "maker": COMPANY_STEMS, "type": DEVICE_TYPES, "price": _whole(9, 180, " dollars", 10)},
            phrases("""
                The {name} is a {type} made by {maker} that costs {price}. / {maker} sells the {name}, a {type}, for {price}.
                For {price} you get the {name}, a {type} from {maker}. / The {type} {name} by {maker} has a price of {price}."""),
            {
                "battery": {hours: (f"Its battery lasts {hours}.", f"It runs for {hours}.") for hours in words("8 hours, 20 hours, 2 days")},
                "colour": {colour: (f"It comes in {colour}.", f"Its colour is {colour}.") for colour in ("black", "white", "blue", "green")},
                "waterproof": {"yes": ("It is waterproof.", "You can swim with it."), "no": ("It is not waterproof.", "Keep it from water.")},
            },
        ),
        Domain(
            "boat trip",
            {"boat": BOATS, "city": CITIES, "duration": _whole(2, 12, " hours"), "fare": _whole(4, 60, " dollars", 5)},
            phrases("""
                The {boat} offers a boat trip of {duration} from {city} for {fare}.
                A boat trip on the {boat} from {city} takes {duration} and costs {fare}.
                For {fare} the {boat} takes you on a boat trip of {duration} from {city}.
                From {city}, the {boat} makes a boat trip of {duration}; the fare is {fare}."""),
            {
                "lunch": {"yes": ("Lunch is included.", "You get lunch on board."), "no": ("Lunch is not included.", "There is no lunch on board.")},
                "guide": {"yes": ("A guide is on board.", "There is a guide."), "no": ("There is no guide.", "No guide is on board.")},
            },
        ),
        Domain(
            "course",
            {"title": COURSES, "teacher": _teacher, "day": WEEKDAYS, "fee": _whole(3, 45, " dollars", 10)},
            phrases("""
                {teacher} teaches {title} on {day} for a fee of {fee}. / The {title} course with {teacher} is on {day} and costs {fee}.
                On {day} you can take {title} with {teacher} for {fee}.
                {title} is a course by {teacher} that takes place on {day}; the fee is {fee}."""),
            {
                "level": {level: (f"It is for {level}.", f"It suits {level}.") for level in ("beginners", "advanced learners", "children")},
                "place": {place: (f"It takes place {place}.", f"You meet {place}.") for place in ("online", "in the library", "at the town hall")},
            },
        ),
    )  # fmt: skip


def data_to_text_row(draw: Draw, _kind: str) -> Row:
    """One record, one text and, outside train, every wording of it."""
    domain = draw.pick(domains())
    main = draw.fill(" ".join(f"{{{field}}}" for field in domain.values), domain.values)[1]
    shown = [field for field in domain.optional if draw.chance(0.5)] or [draw.any(list(domain.optional))]
    extra = {field: draw.any(list(domain.optional[field])) for field in shown}
    record = "; ".join(f"{field}: {value}" for field, value in {"type of record": domain.kind, **main, **extra}.items())
    texts = [
        " ".join([draw.say(wording, main), *(domain.optional[field][value][index % 2] for field, value in extra.items())])
        for index, wording in enumerate(domain.wordings)
    ]
    text = draw.any(texts)
    return {"record": record.removeprefix("type of record: "), "text": text, "references": [text] if draw.train else texts}


# A thing under review; after `=` what judges nothing; then its aspects: what | what one may say for it | and against it.
REVIEW_PARTS = """
hotel
= We stayed for two nights. / I was there for a fair. / We came by train. / We had booked in spring. / It has forty rooms. / It lies near the station.
the room | was spotless, was bright and quiet, had a lovely view, was warm and large | smelled of smoke, was tiny, was dirty, was freezing cold
the staff | were friendly, helped us at once, were patient, knew every street | were rude, ignored us, kept us waiting, lost our luggage
the breakfast | was delicious, was fresh, had fruit of every kind, was plentiful | was stale, was cold, ran out early, tasted of nothing
the bed | was comfortable, was wide and soft, let me sleep well, was freshly made | was lumpy, squeaked all night, was too short, was broken

restaurant
= We sat by the window. / I ordered the soup. / There were six of us. / We went there on a Tuesday. / The menu is short. / It opened in May.
the food | was delicious, came hot and fresh, was full of flavour, looked beautiful | was cold, was far too salty, was bland, made me ill
the waiter | was charming, gave good advice, was quick, remembered us | was rude, forgot our order, was slow, mixed up the dishes
the music | was lovely, was just right, set a good mood, was played live and well | was far too loud, was annoying, hurt my ears, never stopped
the bill | was fair, was lower than I feared, was correct, was easy to split | was wrong, was much too high, had hidden extras, took ages to come

phone
= I bought it in June. / It is my third phone. / It came in a small box. / I use it at work. / It has two cameras. / My brother has the same one.
the battery | lasts two days, charges fast, holds up well, never lets me down | dies by noon, gets hot, charges slowly, swells up
the screen | is sharp, is bright in the sun, reacts at once, shows rich colours | flickers, scratches easily, is too dim, cracked at once
the camera | takes great pictures, is superb at night, focuses fast, is a joy | takes blurry pictures, is useless at night, freezes, is slow
the sound | is clear, is rich and full, fills the room, is good for calls | is tinny, crackles, is too quiet, cuts out

course
= It ran for six weeks. / There were ten of us. / We met on Mondays. / I signed up in May. / We sat in the library. / I took it with a friend.
the teacher | explained things well, was inspiring, was kind, knew every answer | was unprepared, spoke too fast, was impatient, often came late
the material | was excellent, was easy to follow, was up to date, was well made | was outdated, was full of mistakes, was confusing, was missing
the group | was fun, was welcoming, worked well together, was a pleasure | was noisy, was far too large, was unfriendly, was bored
the homework | was useful, was fun to do, helped a lot, was well chosen | was pointless, was far too hard, was never marked, took all weekend

bicycle
= I ride it to work. / It is blue. / It has seven gears. / I ordered it online. / I weigh seventy kilos. / It replaces an old one.
the saddle | is comfortable, fits me perfectly, is soft, is a delight | hurts, came loose, is hard as stone, tore at once
the brakes | work perfectly, grip at once, feel safe, are strong | squeal, failed on a hill, are weak, wore out in a month
the frame | is light and strong, is well built, looks gorgeous, is sturdy | rusted, is too heavy, bent at once, is badly welded
the delivery | was fast, came a day early, was free and easy, was on time | was late, left it damaged, took two months, went wrong twice
"""
SENTIMENTS = ("positive", "negative", "mixed", "neutral")
JOINED = phrases("but / while / although / yet")


def review_row(draw: Draw, label: str) -> Row:
    """One review of a sentiment, and the clauses it rests on."""
    thing, neutral, *lines = draw.pick(REVIEW_PARTS.strip().split("\n\n")).splitlines()
    facts = draw.rng.sample(phrases(neutral.removeprefix("= ")), draw.integer(2, 4))
    aspects = [line.split(" | ") for line in draw.rng.sample(lines, 2)]
    likes = [f"{what} {draw.pick(words(good))}" for what, good, _ in aspects]
    dislikes = [f"{what} {draw.pick(words(bad))}" for what, _, bad in aspects]
    if label == "neutral":
        explanation, review = "no judgement", " ".join(facts)
    else:
        if label == "mixed":
            first, second = (likes[0], dislikes[1]) if draw.chance(0.5) else (dislikes[0], likes[1])
            explanation, said = f"{first}, but {second}", f"{first}, {draw.any(JOINED)} {second}"
        else:
            explanation = said = " and ".join((likes if label == "positive" else dislikes)[: draw.integer(1, 2)])
        review = " ".join(draw.shuffled([f"{sentence(said)}.", *facts[:2]]))
    answer = json.dumps({"label": label, "explanation": explanation})
    return {"review": f"({thing}) {review}", "answer": answer, "label": label, "explanation": explanation}


def generators() -> tuple[Generator, ...]:
    """`data_to_text` and `review_explained`."""
    data_to_text = {
        "name": "data_to_text",
        "title": "Records of apartments, hikes, devices, courses and trips as prose",
        "family": "data-to-text",
        "fields": {
            "record": "what is told, field by field (input)",
            "text": "one to four sentences (target)",
            "references": "all wordings (train: only its own)",
        },
        "input_fields": ["record"],
        "target": "text",
        "references": "references",
        "metric": "rouge_l",
        "instruction": "Write the record as a short text that says everything in it.",
        "template": "Record: {record}\nText:",
        "notes": "One of five kinds of records, and a quarter of the names, occur in validation and test only.",
    }
    reviews = {
        "name": "review_explained",
        "title": "Sentiment of a review with the clause it rests on",
        "family": "classification",
        "fields": {
            "review": "a short review (input)",
            "answer": "a JSON object with label and explanation (target)",
            "label": "the sentiment",
            "explanation": "the clauses that decide it",
        },
        "input_fields": ["review"],
        "target": "answer",
        "metric": "label_and_explanation",
        "instruction": 'Judge the review. Answer with JSON: "label" is positive, negative, mixed or neutral, "explanation" the words that show it '
        'or "no judgement".',
        "template": "Review: {review}\nJudgement:",
        "target_format": 'One JSON object with exactly the keys "label" and "explanation".',
        "notes": "One of five kinds of things, and a quarter of the clauses, occur in validation and test only.",
    }
    return Generator(data_to_text, ("record",), data_to_text_row, ("record",)), Generator(reviews, SENTIMENTS, review_row, ("review",))
