"""The small databases that `text_to_sql` asks about.

Sixteen subjects, each a table with one text label, some text and some number columns, and for some a second table that refers to it. Every
subject gives two databases, the second with fewer columns, in another order, and with other rows. All of it is fixed: no seed changes a database.

Used by sql.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from atoll.tasks.drawing import words

ROWS_IN_TABLE = 14
ROWS_IN_CHILD = 18


@dataclass(frozen=True)
class Column:
    """name in the schema; said: how a question names it. Text columns have values; number columns a range and the words for their two ends."""

    name: str
    said: str
    values: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    most: str = ""
    least: str = ""


@dataclass(frozen=True)
class Child:
    """A second table whose first column holds the main table's label, and whose second is a number."""

    table: str
    noun: str
    number: Column


@dataclass(frozen=True)
class Database:
    """One schema with its rows. Everything follows from `key`, nothing from a seed."""

    key: str
    table: str
    noun: str
    label: Column
    texts: tuple[Column, ...]
    numbers: tuple[Column, ...]
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Any], ...]
    child: Child | None
    child_rows: tuple[tuple[str, int], ...]

    @property
    def schema(self) -> str:
        second = f"; {self.child.table}({self.label.name}, {self.child.number.name})" if self.child else ""
        return f"{self.table}({', '.join(column.name for column in self.columns)}){second}"

    @property
    def script(self) -> str:
        """The SQL that creates and fills the tables."""
        kinds = ", ".join(f"{column.name} {'TEXT' if column.values else 'INTEGER'}" for column in self.columns)
        values = ",\n".join("(" + ", ".join(literal(row[column.name]) for column in self.columns) + ")" for row in self.rows)
        script = f"CREATE TABLE {self.table} ({kinds});\nINSERT INTO {self.table} VALUES\n{values};\n"
        if self.child:
            values = ",\n".join(f"({literal(label)}, {number})" for label, number in self.child_rows)
            script += f"CREATE TABLE {self.child.table} ({self.label.name} TEXT, {self.child.number.name} INTEGER);\n"
            script += f"INSERT INTO {self.child.table} VALUES\n{values};\n"
        return script


# Table and noun; label column and its values; text columns; number columns `name low high (said): most; least`; `+` a second table.
# A comma at the end of a line carries on.
SUBJECTS = """
books | book
title (title): The Long Field, Salt Roads, A Quiet Harbour, Nine Lamps, Paper Birds, The Glass Orchard, Winter Bread, Low Tide, The Last Ferry,
Copper Sky, Small Fires, The Blue Stair, Night Garden, Stone Letters, Open Water, The Clockmaker
genre (genre): history, poetry, travel, cooking, crime
language (language): English, Spanish, Danish, Korean
pages 90 640 (number of pages): longest; shortest
year 1951 2023 (year of publication): newest; oldest
price 6 60 (price): most expensive; cheapest
+ loans | loan | days 1 40 (number of days)

hikes | hike
name (name): Falcon Ridge, Moss Valley, Echo Lake, Three Bridges, Heron Marsh, Granite Loop, Fern Hollow, Old Mill Path, Cedar Pass, Sunrise Point,
Wolf Creek, Pebble Coast, Thistle Hill, Lantern Cave, Birch Trail, Silver Falls
region (region): north, south, coast, highlands, east
difficulty (difficulty): easy, moderate, hard
length_km 2 40 (length): longest; shortest
climb_m 40 1800 (climb): steepest; flattest
visitors 100 9000 (number of visitors): most popular; least popular

employees | employee
name (name): Jane Holt, Tom Becker, Aisha Okafor, Pedro Santos, Mina Lund, Oscar Patel, Ruth Moreau, Kofi Mensah, Elena Novak, Victor Reyes,
Naomi Quinn, Ivan Petrov, Grace Doyle, Hassan Iqbal, Lucia Costa, Peter Weber
department (department): sales, finance, design, support, legal
city (city): Oslo, Lyon, Lima, Osaka
salary 2100 9800 (salary): best paid; worst paid
age 21 66 (age): oldest; youngest
+ absences | absence | days 1 30 (number of days)

devices | device
model (model): Kite S, Lumo 3, Orbit Mini, Pixelo, Nova Two, Tern X, Vela Pro, Arc 5, Fable, Comet Air, Quartz, Dune 9, Ember, Iris Plus, Sable,
Zephyr
maker (maker): Norvik, Halden, Pelora, Zentra
type (type): phone, tablet, laptop, camera
price 90 1900 (price): most expensive; cheapest
weight_g 110 2400 (weight): heaviest; lightest
battery_h 4 50 (battery life): longest lasting; shortest lasting

players | player
name (name): Leo Hansen, Marco Silva, Yuki Tanaka, Daniel Osei, Bruno Lambert, Felix Bauer, Omar Diallo, Kenji Sato, Erik Larsen, Adam Nowak,
Ravi Sharma, Noah Frost, Jonas Klein, Carl Greer, Hugo Berg, Emil Walsh
team (team): Falcons, Rovers, Harbour, Union
position (position): keeper, defender, striker, midfielder
goals 0 38 (number of goals): highest scoring; lowest scoring
matches 1 60 (number of matches): most experienced; least experienced
+ injuries | injury | weeks 1 20 (number of weeks)

courses | course
title (title): Pottery, Bread Baking, First Aid, Spanish Basics, Bookkeeping, Web Design, Beekeeping, Chess, Life Drawing, Sewing, Photography,
Gardening, Public Speaking, Guitar, Algebra, Bicycle Repair
teacher (teacher): Vera Lund, Paul Hale, Tara Bell, Louis Frost, Dana Quinn
weekday (weekday): Monday, Tuesday, Thursday, Friday
fee 20 400 (fee): most expensive; cheapest
places 6 45 (number of places): largest; smallest

flights | flight
code (code): AT101, AT117, BL220, BL245, CR310, CR388, DX402, DX419, EN530, EN571, FJ600, FJ622, GK715, GK740, HM801, HM866
origin (origin): Oslo, Lisbon, Vienna, Dublin
destination (destination): Porto, Cairo, Boston, Geneva, Tunis
minutes 45 720 (duration): longest; shortest
fare 60 1300 (fare): most expensive; cheapest
+ delays | delay | minutes_late 5 240 (number of minutes)

apartments | apartment
address (address): 4 Mill Lane, 12 Harbour Street, 9 Oak Road, 31 Station Way, 7 Park Row, 18 Bridge Street, 2 Church Hill, 25 Market Square,
40 River Walk, 6 Elm Court, 15 Castle Road, 22 Garden Close, 3 Tower Street, 11 Abbey Lane, 28 Canal Side, 36 North Terrace
district (district): old town, harbour, hillside, centre
heating (heating): gas, electric, district heat
rent 500 3200 (rent): most expensive; cheapest
area_m2 22 160 (area): largest; smallest
floor 0 19 (floor): highest; lowest

recipes | recipe
name (name): Lentil Soup, Onion Tart, Apple Crumble, Fish Stew, Rice Salad, Bean Chili, Carrot Cake, Potato Gratin, Mushroom Pie, Lemon Pasta,
Corn Bread, Beet Curry, Plum Tart, Egg Noodles, Spinach Rolls, Pea Risotto
cuisine (cuisine): Indian, Italian, Mexican, French, Greek
course (course): starter, main, dessert
minutes 10 180 (cooking time): slowest; fastest
calories 120 950 (number of calories): richest; lightest

museums | museum
name (name): City Museum, Maritime House, Museum of Glass, Toy Museum, Railway Hall, Folk Museum, Clock Museum, Gallery North, Old Mint,
Textile House, Museum of Maps, Salt Museum, Science Hall, Puppet House, Stone Gallery, Music Museum
city (city): Graz, Ghent, Turin, Leeds
topic (topic): art, science, history, crafts
visitors 2000 90000 (number of visitors): most popular; least popular
founded 1801 2015 (year of foundation): newest; oldest
+ tours | tour | guests 4 60 (number of guests)

cars | car
model (model): Alto Rush, Borea, Cinder, Dune, Elden 4, Fjord, Glide, Hopper, Ivory, Jolt, Karst, Linden, Marisol GT, Nomad, Otter, Pacer
maker (maker): Talvera, Solvane, Calder, Medora
fuel (fuel): petrol, diesel, electric, hybrid
power_hp 60 420 (power): strongest; weakest
price 9000 82000 (price): most expensive; cheapest
seats 2 20 (number of seats): biggest; smallest

concerts | concert
band (band): Paper Moon, The Lanterns, Cold Harbour, Blue Static, Tin Parade, Velvet Rail, North Choir, Sunday Drums, Paper Animals Club,
Hollow Oak, River Kings, Slow Comet, Red Ladder, The Weathervanes, Echo Park Four, Marble Arch
venue (venue): Town Hall, Arena, Old Barn, River Stage
genre (genre): jazz, rock, folk, techno
ticket_price 8 150 (ticket price): most expensive; cheapest
audience 60 9000 (audience): biggest; smallest

plants | plant
name (name): fern, basil, lavender, tulip, mint, rosemary, sunflower, ivy, thyme, peony, sage, iris, clover, dahlia, jasmine, aster
light (light): sun, shade, half shade
soil (soil): sandy, loamy, clay, peat
height_cm 8 300 (height): tallest; shortest
price 2 70 (price): most expensive; cheapest
+ waterings | watering | litres 1 25 (number of litres)

films | film
title (title): The Orchard Keeper, Late Train, Silent Bay, Two Umbrellas, The Baker's Map, Falling North, Green Window, The Visitor Next Door,
Snow Atlas, Borrowed Time, The Signal Man, Driftwood, A Simple Question, High Water, The Long Table, Candle Street
director (director): Ada Frost, Theo Marino, Salma Haddad, Ben Carter
genre (genre): comedy, drama, thriller, animation
minutes 70 210 (running time): longest; shortest
rating 20 99 (rating): best rated; worst rated

farms | farm
name (name): Hill Farm, Green Acre, Long Meadow, Brook Farm, Sunny Side, Fox Hollow, Red Barn, Willow End, Upper Field, Stone Gate, Larkspur,
Ten Elms, Mill Farm, Apple Yard, West Ridge, Clover Farm
county (county): Kent, Mayo, Fife, Devon
crop (crop): wheat, barley, apples, hops
hectares 4 400 (area): largest; smallest
workers 1 60 (number of workers): best staffed; worst staffed

ships | ship
name (name): Aurora, Sea Heron, Polar Star, Meridian, Gull, Northern Light, Cormorant, Estrella, Kingfisher, Osprey, Albatross, Morning Tide,
Petrel, Sirius, Triton, Halcyon
port (port): Bergen, Genoa, Dakar, Busan
cargo (cargo): grain, timber, oil, fruit
length_m 30 390 (length): longest; shortest
crew 6 90 (crew size): best manned; worst manned
+ voyages | voyage | miles 100 9000 (number of miles)
"""  # fmt: skip


def literal(value: str | int) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def _number_column(text: str) -> Column:
    """`pages 90 640 (number of pages): longest; shortest`; the part after the colon may be missing."""
    head, _, ends = text.partition(":")
    name, low, high = head.split("(")[0].split()
    most, _, least = ends.partition(";")
    return Column(name, head.split("(")[1].rstrip(") "), (), int(low), int(high), most.strip(), least.strip())


def _subject(block: str, variant: int) -> Database:
    """The `variant`-th (0 or 1) database of a subject: the second leaves out one column where three are left, and has other rows."""
    first, second, *rest = block.replace(",\n", ", ").splitlines()
    table, noun = first.split(" | ")
    label = _text_column(second)
    lines = [line for line in rest if not line.startswith("+")]
    texts = [_text_column(line) for line in lines if not line.split("(")[0].split()[1:]]
    numbers = [_number_column(line) for line in lines if line.split("(")[0].split()[1:]]
    rng = random.Random(f"database:{table}_{variant}")
    if variant and len(texts) + len(numbers) > 4:
        del numbers[rng.randrange(len(numbers))]
    columns = [label, *texts, *numbers]
    if variant:
        columns = [label, *rng.sample(columns[1:], len(columns) - 1)]
    values: dict[str, list[Any]] = {column.name: rng.sample(range(column.low, column.high + 1), ROWS_IN_TABLE) for column in numbers}
    for column in texts:
        values[column.name] = rng.choices(column.values, k=ROWS_IN_TABLE)
    values[label.name] = rng.sample(label.values, ROWS_IN_TABLE)
    rows = tuple({column.name: values[column.name][index] for column in columns} for index in range(ROWS_IN_TABLE))
    child: Child | None = None
    child_rows: tuple[tuple[Any, int], ...] = ()
    for line in rest:
        if line.startswith("+"):
            child_table, child_noun, number = line[1:].strip().split(" | ")
            child = Child(child_table, child_noun, _number_column(number))
            child_rows = tuple((rng.choice(values[label.name]), rng.randint(child.number.low, child.number.high)) for _ in range(ROWS_IN_CHILD))
    return Database(f"{table}_{variant}", table, noun, label, tuple(texts), tuple(numbers), tuple(columns), rows, child, child_rows)


def _text_column(line: str) -> Column:
    """`genre (genre): history, poetry`."""
    head, _, values = line.partition(":")
    name, _, said = head.partition(" (")
    return Column(name, said.rstrip(")"), words(values))


@cache
def databases() -> tuple[tuple[Database, ...], ...]:
    """Both databases of each subject, subject by subject."""
    return tuple((_subject(block, 0), _subject(block, 1)) for block in SUBJECTS.strip().split("\n\n"))
