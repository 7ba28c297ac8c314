"""The built-in task `text_to_sql`: a question over a small database, answered by a query that runs.

Conditions are taken from rows that exist and the numbers within a column differ, so a gold query has one answer, and seldom an empty one. A row names
its database; the task dict's `databases` maps that name to the SQL script that builds it. Four of the sixteen subjects occur in validation and test
only.
"""

from __future__ import annotations

from typing import Any

from atoll.tasks.databases import databases, literal
from atoll.tasks.drawing import Draw, Generator, Row, phrases

# Each kind of query, with the ways to ask for it; the fourth way of each occurs in validation and test only. {t} is the plural, {noun} the
# singular, {label} the column of names.
ASKED: dict[str, tuple[str, ...]] = {
    "list_text": phrases("""
        Which {t} have the {text} {value}? / List the {label} of every {noun} whose {text} is {value}.
        Give the {label} of all {t} with {text} {value}.
        Show me each {noun} whose {text} is {value}. / What are the {t} with the {text} {value}?"""),
    "list_number": phrases("""
        Which {t} have a {number} {compared} {n}? / List the {label} of every {noun} whose {number} is {compared} {n}.
        Show the {t} with a {number} {compared} {n}.
        Find each {noun} with a {number} {compared} {n}. / Give the {label} of all {t} whose {number} is {compared} {n}."""),
    "list_both": phrases("""
        Which {t} with {text} {value} have a {number} {compared} {n}?
        List the {label} of every {noun} whose {text} is {value} and whose {number} is {compared} {n}.
        Show the {t} with {text} {value} and a {number} {compared} {n}. / Find each {noun} whose {text} is {value} and {number} {compared} {n}."""),
    "count_all": phrases("""
        How many {t} are there? / What is the [total|] number of {t} [in the table|in the database|]? / Count [all|the|] {t}.
        Tell me how many {t} [exist|we have]. / How many {t} do we have?"""),
    "count_text": phrases("""
        How many {t} have the {text} {value}? / Count the {t} whose {text} is {value}. / How many {t} are there with {text} {value}?
        What is the number of {t} with {text} {value}? / How many of the {t} have {value} as their {text}?"""),
    "count_number": phrases("""
        How many {t} have a {number} {compared} {n}? / Count the {t} whose {number} is {compared} {n}.
        How many {t} are there with a {number} {compared} {n}?
        What is the number of {t} with a {number} {compared} {n}?"""),
    "aggregate": phrases("""
        What is the {function} {number} of [all|the] {t}? / Give the {function} {number} of [all|the] {t}.
        Show the {function} {number} over all {t}.
        I need the {function} {number} of [all|the] {t}. / Find the {function} {number} among [all|the] {t}."""),
    "aggregate_text": phrases("""
        What is the {function} {number} of {t} whose {text} is {value}? / Give the {function} {number} of the {t} with {text} {value}.
        For {t} with {text} {value}, what is the {function} {number}? / Find the {function} {number} among {t} whose {text} is {value}."""),
    "superlative": phrases("""
        Which {noun} has the {end} {number}? / What is the {label} of the {noun} with the {end} {number}? / Which is the {superlative} {noun}?
        Name the {superlative} of the {t}. / Find the {label} of the {superlative} {noun}."""),
    "top": phrases("""
        List the {label} of the {k} {t} with the {end} {number}. / Which {k} {t} have the {end} {number}? / Name the {k} {superlative} {t}.
        Show me the {k} {t} with the {end} {number}. / What are the {k} {superlative} {t}?"""),
    "lookup": phrases("""
        What is the {number} of {name}? / Give the {number} of the {noun} {name}. / Show the {number} of {name}.
        Tell me the {number} of {name}. / Look up the {number} for the {noun} {name}."""),
    "lookup_text": phrases("""
        What is the {text} of {name}? / Give the {text} of the {noun} {name}. / Show the {text} of {name}. / Tell me the {text} of {name}.
        Look up the {text} for the {noun} {name}."""),
    "distinct": phrases("""
        Which different values of {text} do the {t} have? / List every {text} of the {t} once.
        What [different|distinct] values does {text} take [among|for|over] the {t}?
        Show the distinct {text} values of the {t}. / Give each {text} that occurs among the {t}, without repeats."""),
    "count_by": phrases("""
        How many {t} are there for each {text}? / Count the {t} by {text}. / Show each {text} with its number of {t}.
        For every {text}, how many {t} are there?
        Give the number of {t} per {text}."""),
    "aggregate_by": phrases("""
        What is the {function} {number} of the {t} for each {text}? / Show the {function} {number} [of the {t}|of {t}] by {text}.
        Give the {function} {number} per {text} [of the {t}|].
        For every {text}, what is the {function} {number} of the {t}?"""),
    "join_sum": phrases("""
        What is the total {child_number} of all {children} for {t} whose {text} is {value}?
        Add up the {child_number} of the {children} for {t} with {text} {value}.
        For {t} with {text} {value}, what is the total {child_number} of their {children}?
        Give the summed {child_number} of {children} for each {noun} whose {text} is {value}."""),
    "join_count": phrases("""
        How many {children} are there for {t} whose {text} is {value}? / Count the {children} that belong to {t} with {text} {value}.
        How many {children} do {t} with {text} {value} have?
        What is the number of {children} for {t} whose {text} is {value}?"""),
}  # fmt: skip

QUERIES: dict[str, str] = {
    "list_text": "SELECT {label} FROM {t} WHERE {is_value}",
    "list_number": "SELECT {label} FROM {t} WHERE {is_compared}",
    "list_both": "SELECT {label} FROM {t} WHERE {is_value} AND {is_compared}",
    "count_all": "SELECT COUNT(*) FROM {t}",
    "count_text": "SELECT COUNT(*) FROM {t} WHERE {is_value}",
    "count_number": "SELECT COUNT(*) FROM {t} WHERE {is_compared}",
    "aggregate": "SELECT {sql_function}({number}) FROM {t}",
    "aggregate_text": "SELECT {sql_function}({number}) FROM {t} WHERE {is_value}",
    "superlative": "SELECT {label} FROM {t} ORDER BY {number}{direction} LIMIT 1",
    "top": "SELECT {label} FROM {t} ORDER BY {number}{direction} LIMIT {k}",
    "lookup": "SELECT {number} FROM {t} WHERE {is_name}",
    "lookup_text": "SELECT {text} FROM {t} WHERE {is_name}",
    "distinct": "SELECT DISTINCT {text} FROM {t}",
    "count_by": "SELECT {text}, COUNT(*) FROM {t} GROUP BY {text}",
    "aggregate_by": "SELECT {text}, {sql_function}({number}) FROM {t} GROUP BY {text}",
    "join_sum": "SELECT SUM({children}.{child_number}) FROM {children} JOIN {t} ON {children}.{label} = {t}.{label} WHERE {t}.{is_value}",
    "join_count": "SELECT COUNT(*) FROM {children} JOIN {t} ON {children}.{label} = {t}.{label} WHERE {t}.{is_value}",
}
# Rows of a kind in each round of the generator: fewer where a database has few such questions, so that the task does not run out of them.
SHARES = {**dict.fromkeys(QUERIES, 4), "superlative": 2, "join_sum": 2, "join_count": 2, "count_all": 1, "distinct": 1, "count_by": 1}
FUNCTIONS = (("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM"))
NEVER_SUMMED = ("year", "founded", "age", "rating", "floor")


def sql_row(draw: Draw, kind: str) -> Row:
    """One question of a kind about one database."""
    database = draw.any(draw.pick(databases()))
    while kind.startswith("join") and not database.child:
        database = draw.any(draw.pick(databases()))
    text, number, row = draw.any(database.texts), draw.any(database.numbers), draw.any(database.rows)
    if kind.startswith("join"):
        owner = draw.any(database.child_rows)[0]
        row = next(row for row in database.rows if row[database.label.name] == owner)
    # The bound lies just beside the row's own value, so that the row meets the condition and a bound is seldom a value of the column.
    above = draw.chance(0.5)
    bound = row[number.name] - draw.integer(1, 4) if above else row[number.name] + draw.integer(1, 4)
    compared = draw.any(("above", "over", "greater than") if above else ("below", "under", "less than"))
    highest = draw.chance(0.5)
    said_function, function = draw.any(FUNCTIONS[:3] if number.name in NEVER_SUMMED else FUNCTIONS)
    count = draw.integer(2, 6)
    name, value = row[database.label.name], row[text.name]
    shared = {"t": database.table, "k": str(count), "children": database.child.table if database.child else ""}
    said = {
        **shared, "noun": database.noun, "label": database.label.said, "text": text.said, "value": value, "number": number.said, "name": name,
        "compared": compared, "n": str(bound),
        "function": said_function, "end": "highest" if highest else "lowest", "superlative": number.most if highest else number.least,
        "child_number": database.child.number.said if database.child else "",
    }  # fmt: skip
    query = QUERIES[kind].format(
        **shared, label=database.label.name, text=text.name, number=number.name, is_value=f"{text.name} = {literal(value)}", sql_function=function,
        is_compared=f"{number.name} {'>' if above else '<'} {bound}", is_name=f"{database.label.name} = {literal(name)}",
        direction=" DESC" if highest else "", child_number=database.child.number.name if database.child else "",
    )  # fmt: skip
    question = draw.say(draw.pick(ASKED[kind]), said)
    return {"schema": database.schema, "question": question, "query": query, "database": database.key, "kind": kind}


def _scripts() -> dict[str, Any]:
    return {"databases": {database.key: database.script for pair in databases() for database in pair}}


def generators() -> tuple[Generator, ...]:
    """`text_to_sql`."""
    description = {
        "name": "text_to_sql",
        "title": "Questions over small databases, answered by SQL that runs",
        "family": "SQL",
        "fields": {
            "schema": "tables and columns (input)",
            "question": "a question about the data (input)",
            "query": "the SQL query (target)",
            "database": "the name of the row's database in the description's `databases`, which maps it to the SQL script that builds it",
            "kind": f"the kind of query, one of {len(QUERIES)}",
        },
        "input_fields": ["schema", "question"],
        "target": "query",
        "metric": "sql_execution",
        "other_metrics": ["exact_match"],
        "match": "sql",
        "database_field": "database",
        "instruction": "Write the SQL query that answers the question.",
        "template": "Tables: {schema}\nQuestion: {question}\nSQL:",
        "target_format": "one SELECT statement for SQLite",
        "notes": "Four of sixteen subjects, and a way to ask for each kind of query, occur in validation and test only. On the other subjects a test "
        "query may be one of train, asked for in other words.",
    }
    kinds = tuple(kind for kind, share in SHARES.items() for _ in range(share))
    return (Generator(description, kinds, sql_row, ("schema", "question"), _scripts),)
