"""Two built-in tasks whose answer is a JSON object: `entities_json` (who, which firm, where, when) and `tool_calls` (which function, with what).

A template is filled and the words that went into its slots become the JSON, so text and answer agree by construction. Names and wordings, and for
`tool_calls` whole tools, are held out of train.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from atoll.tasks.drawing import Draw, Generator, Row, Slots, phrases, sentence, words
from atoll.tasks.vocabulary import CITIES, COMPANY_KINDS, COMPANY_STEMS, FIRST_NAMES, LAST_NAMES, MONTHS, SHOP_ITEMS, WEEKDAYS, ordinal

ENTITY_TYPES = ("person", "company", "city", "date")
ENTITY_SENTENCES = phrases("""
    {person} joined {company} as head of sales on {date}. / {company} will open a second plant in {city}, {person} said.
    On {date} {company} moved its main office to {city}.
    {person} and {person2} founded {company} in {city}. / {company} and {company2} signed a contract in {city} on {date}.
    The flight from {city} to {city2} was late again.
    {person} left {company} after nine years. / A fire damaged the {company} warehouse near {city}. / {person} gave a talk in {city} on {date}.
    Shares of {company} fell by four percent.
    {company} has named {person} as its new chair. / According to {person}, the factory in {city} is safe.
    {person} met {person2} at the station of {city}. / {company2} sued {company} on {date}.
    The merger of {company} and {company2} was called off. / {person}, who was born in {city}, now works in {city2}.
    Nobody at the meeting had ordered a {item}. / The results are due on {date}.
    {city} will host the fair, and {company} pays for it. / {person} of {company} could not be reached for comment.
    On {date}, {person} took the train to {city}. / {company} hired forty engineers.
    {person} sold the house in {city} to {person2}. / Trains between {city}, {city2} and {city3} stopped on {date}.
    The letter from {company} arrived without a stamp. / The {item} was cheap.
    {company} recalled every {item} after {person} complained. / {person} will lead the {city} branch of {company} from {date}.
    Workers of {company} went on strike in {city}. / {person}: "We will rebuild {city}."
    The award went to {person} and to {person2}. / A court in {city} fined {company} on {date}. / Ask {person} for the {item}.
    The new bridge cost more than planned, and so did the {item}.
    Before {date} nobody in {city} had heard of {company}. / {person} bought shares of {company} and {company2}.
    The mayor of {city}, {person}, resigned on {date}. / {company} closes its shop in {city}.""")


def _date(draw: Draw) -> str:
    day, month = draw.integer(1, 28), draw.any(MONTHS)
    return draw.any((f"{day} {month}", f"{month} {day}", f"{month} {ordinal(day)}", f"{day} {month} {draw.integer(1998, 2026)}", draw.any(WEEKDAYS)))


def _person(draw: Draw) -> str:
    return f"{draw.pick(FIRST_NAMES)} {draw.pick(LAST_NAMES)}"


def _company(draw: Draw) -> str:
    return f"{draw.pick(COMPANY_STEMS)} {draw.any(COMPANY_KINDS)}"


def entities_row(draw: Draw, _kind: str) -> Row:
    """One sentence and what it names: types in the order of ENTITY_TYPES, left out when empty; each type's names in order of appearance."""
    slots: Slots = {"person": _person, "company": _company, "city": CITIES, "date": _date, "item": SHOP_ITEMS}
    text, chosen = draw.fill(draw.pick(ENTITY_SENTENCES), slots)
    named = {kind: [value for slot, value in chosen.items() if slot.rstrip("23") == kind] for kind in ENTITY_TYPES}
    return {"sentence": text, "entities": json.dumps({kind: values for kind, values in named.items() if values})}


@dataclass(frozen=True)
class Tool:
    """A function an assistant may call, and requests that need it; an argument's name in a request is also its slot. Whole numbers stay numbers."""

    name: str
    arguments: tuple[str, ...]
    requests: tuple[str, ...]

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(self.arguments)})"


# What an argument may be: a whole number between two ends, or one of a list.
NUMBERS: dict[str, tuple[int, int]] = {
    "minutes": (2, 90),
    "hour": (5, 22),
    "people": (2, 12),
    "amount": (5, 950),
    "degrees": (12, 27),
    "percent": (5, 95),
    "pages": (1, 40),
    "floor": (1, 30),
}
WORDS: dict[str, tuple[str, ...]] = {
    "city": CITIES,
    "destination": CITIES,
    "contact": FIRST_NAMES,
    "recipient": FIRST_NAMES,
    "item": SHOP_ITEMS,
    "day": WEEKDAYS,
    "room": words("kitchen, bedroom, hall, office, bathroom, cellar, living room, garage, attic, nursery, library, porch"),
    "song": words("""
        Blue Lantern, River Song, Night Bus, Golden Hour, Paper Plane, Long Way Down,
        Silver Rain, Old Friends, Kitchen Dance, First Snow, Stay Awake, Low Moon"""),
    "language": words("Spanish, French, Danish, Korean, Italian, Polish, Swahili, Turkish, Greek, Finnish, Hindi, Welsh"),
    "phrase": words("""
        good night, thank you, where is the station, see you soon, I am hungry,
        how much is it, nice to meet you, the bill please, happy birthday, I am lost"""),
    "message": words("""
        I am late, call me back, the train is cancelled, dinner is ready, see you at noon,
        bring the keys, happy birthday, I found the cat, we won, buy some milk"""),
    "topic": words("gardening, football, jazz, space travel, local politics, chess, baking, hiking, opera, birds, robots, history"),
    "currency": words("euros, yen, dollars, pounds, francs, crowns, pesos, rupees"),
    "station": words("Radio North, City Jazz, Morning FM, Classic Hall, Harbour Radio, News One, Folk Wave, Sound Garden"),
    "document": words("the lease, the tax form, the travel plan, the guest list, the invoice, the map, the menu, the report"),
    "plant": words("the basil, the ferns, the roses, the tomatoes, the lawn, the cactus, the orchids, the lemon tree"),
}  # fmt: skip

TOOL_LIST = """
set_timer(minutes)
set a timer for {minutes} minutes / wake me in {minutes} minutes / start a {minutes} minute countdown / I need a timer, {minutes} minutes
tell me when {minutes} minutes are over

get_weather(city, day)
what will the weather be like in {city} on {day}? / will it rain in {city}? / weather for {city} please
do I need an umbrella on {day} in {city}? / how warm is it in {city} right now?

send_message(recipient, message)
text {recipient} "{message}" / send {recipient} the message "{message}" / write to {recipient}: "{message}"
let {recipient} know: "{message}" / message {recipient} saying "{message}"

convert_currency(amount, currency)
what are {amount} dollars in {currency}? / convert {amount} dollars to {currency} / change {amount} dollars into {currency}
how many {currency} do I get for {amount} dollars?

play_song(song)
play {song} / I want to hear {song} / put on {song} / could you play the song {song}? / start {song} please

book_table(people, city, day)
book a table for {people} in {city} on {day} / reserve a table for {people} people on {day} / we are {people} and want to eat out in {city}
I need a table on {day} for {people} / dinner for {people} in {city} on {day}

set_heating(room, degrees)
set the {room} to {degrees} degrees / make it {degrees} degrees in the {room} / heat the {room} to {degrees} degrees
I want {degrees} degrees in the {room}

print_document(document, pages)
print {document} / print the first {pages} pages of {document} / I need {document} on paper / get me {pages} pages of {document} from the printer

call_contact(contact)
call {contact} / phone {contact} please / I want to talk to {contact} / ring {contact} / get {contact} on the line

translate(phrase, language)
how do you say "{phrase}" in {language}? / translate "{phrase}" into {language} / what is "{phrase}" in {language}?
give me the {language} for "{phrase}"

add_to_cart(item, amount)
put a {item} in my cart / add {amount} of the {item} to the cart / I'd like to buy a {item} / order {amount} pieces of the {item}
a {item} please, into the basket

find_train(destination, day, hour)
find a train to {destination} on {day} / is there a train to {destination} at {hour}?
I have to be in {destination} on {day} at {hour}, which train? / trains to {destination} please
when on {day} can I go to {destination} by rail?

dim_light(room, percent)
dim the {room} light to {percent} percent / light in the {room} at {percent} percent / set the lamp in the {room} to {percent} percent
make the {room} {percent} percent bright

get_news(topic)
what's new in {topic}? / read me the news about {topic} / any headlines on {topic}? / news on {topic} please
tell me what happened in {topic} today

add_reminder(message, day, hour)
remind me on {day}: "{message}" / remind me at {hour}: "{message}" / on {day} at {hour} I must hear "{message}"
set a reminder "{message}" for {day} / don't let me forget "{message}" on {day}

water_plants(plant, minutes)
water {plant} / water {plant} for {minutes} minutes / {plant} need water / give {plant} {minutes} minutes of water
let the sprinkler run on {plant} for {minutes} minutes

tune_radio(station)
switch to {station} / I want to listen to {station} / turn the radio to {station} / tune in to {station} / radio please, {station}

transfer_money(recipient, amount)
send {amount} dollars to {recipient} / pay {recipient} {amount} dollars / I owe {recipient} {amount} dollars, pay it
transfer {amount} dollars to {recipient} / give {recipient} {amount} dollars from my account

lock_door(room)
lock the door of the {room} / is the {room} locked? if not, lock it / please lock the {room} / make sure nobody gets into the {room}

call_lift(floor)
send the lift to floor {floor} / I'm on floor {floor}, call the lift / lift to floor {floor} please / bring the lift to {floor}

find_recipe(topic, minutes)
find a recipe that fits {topic} / what can I cook in {minutes} minutes? / a dish for an evening of {topic} please
something to cook in {minutes} minutes for friends of {topic}

book_taxi(destination, hour)
get me a taxi to {destination} at {hour} / I need a cab to {destination} / taxi at {hour} to {destination} please
order a taxi to {destination} for {hour}

check_stock(item, city)
do you have a {item} in {city}? / is the {item} in stock? / how many pieces of the {item} are left in {city}? / can I get a {item} in the {city} shop?

start_vacuum(room)
vacuum the {room} / send the robot to the {room} / clean the floor of the {room} / the {room} is dusty, vacuum it
"""

TOOL_OPENERS = phrases("please, / hey, / hi, / could you help? / thanks in advance: / now / quickly: / one more thing:")
NUM_TOOLS_SHOWN = 4


@cache
def tools() -> tuple[Tool, ...]:
    """The tools of TOOL_LIST: a signature, then the requests that need it."""
    blocks = [block.partition("\n") for block in TOOL_LIST.strip().split("\n\n")]
    return tuple(Tool(head.split("(")[0], words(head.split("(")[1].rstrip(")")), phrases(requests)) for head, _, requests in blocks)


def _values(argument: str) -> Sequence[str] | Callable[[Draw], str]:
    """What an argument's slot is filled with."""
    if argument in NUMBERS:
        low, high = NUMBERS[argument]
        return lambda draw: str(draw.integer(low, high))
    return WORDS[argument]


def tool_row(draw: Draw, _kind: str) -> Row:
    """One request, the tools at hand in random order, and the call that answers it; arguments that the request does not give are left out."""
    shown = draw.several(tools(), NUM_TOOLS_SHOWN)
    tool = shown[0]
    request, chosen = draw.fill(draw.pick(tool.requests), {name: _values(name) for name in tool.arguments})
    if draw.chance(0.3):
        request = f"{draw.pick(TOOL_OPENERS)} {request}"
    arguments = {name: int(chosen[name]) if name in NUMBERS else chosen[name] for name in tool.arguments if name in chosen}
    listed = ", ".join(other.signature for other in draw.shuffled(shown))
    call = json.dumps({"tool": tool.name, "arguments": arguments}, ensure_ascii=False)
    return {"tools": listed, "request": sentence(request), "call": call, "tool": tool.name}


def generators() -> tuple[Generator, ...]:
    """`entities_json` and `tool_calls`."""
    entities = {
        "name": "entities_json",
        "title": "People, companies, cities and dates of a sentence as JSON",
        "family": "NER",
        "fields": {"sentence": "a sentence (input)", "entities": "a JSON object: type to list of names (target)"},
        "input_fields": ["sentence"],
        "target": "entities",
        "entity_types": list(ENTITY_TYPES),
        "metric": "exact_match",
        "match": "json",
        "other_metrics": ["span_f1"],
        "instruction": "List the persons, companies, cities and dates of the sentence as a JSON object.",
        "template": "Sentence: {sentence}\nJSON:",
        "target_format": "One JSON object that maps each type that occurs to the list of its names in order of appearance, {} when there are none. "
        "span_f1 scores the multiset of (type, name) pairs.",
        "notes": "A quarter of the names and of the sentence forms occurs in validation and test only.",
    }
    calls = {
        "name": "tool_calls",
        "title": "Choose a tool for a request and fill in its arguments",
        "family": "tool use",
        "fields": {
            "tools": "signatures of the tools at hand (input)",
            "request": "a user's request (input)",
            "call": "a JSON object with tool and arguments (target)",
            "tool": "the right tool's name",
        },
        "input_fields": ["tools", "request"],
        "target": "call",
        "metric": "exact_match",
        "match": "json",
        "instruction": "Answer the request with one call of a tool, as JSON.",
        "template": "Tools: {tools}\nRequest: {request}\nCall:",
        "target_format": 'One JSON object {"tool": name, "arguments": {name: value}}; whole numbers are JSON numbers; '
        "arguments not given are left out.",
        "notes": f"A quarter of the {len(tools())} tools, and of each tool's wordings, occurs in validation and test only.",
    }
    return Generator(entities, ("sentence",), entities_row, ("sentence",)), Generator(calls, ("request",), tool_row, ("request",))
