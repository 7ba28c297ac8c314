"""Word lists that several built-in tasks draw from: people, places, firms, things, calendars.

Order matters: every fourth entry is held out of train (see drawing.py), so neighbours should be alike and no list sorted by difficulty. Firms and
product names are invented.
"""

from __future__ import annotations

from atoll.tasks.drawing import words

FIRST_NAMES = words("""
    Jane, Tom, Aisha, Pedro, Mina, Oscar, Ruth, Kofi, Elena, Victor, Naomi, Ivan, Grace, Hassan, Lucia, Peter, Wei, Clara, Samuel, Priya, Anton,
    Nora, Diego,
    Fatima, Leo, Hannah, Marco, Yuki, Daniel, Rosa, Felix, Amara, Simon, Ingrid, Omar, Julia, Kenji, Martha, Paul, Zara, Erik, Sofia, Adam, Leila,
    Bruno,
    Alice, Ravi, Helen, Noah, Tara, Jonas, Maria, Carl, Bella, Andre, Vera, Louis, Dana, Henry, Mei, Theo, Olga, Milan, Irene, Jacob, Salma, Ben,
    Freya,
    Hugo, Lena, Nadia, Walter, Kira, Emil, Stella, Rafael, Ada, Marcus, Joy, Tariq""")

LAST_NAMES = words("""
    Holt, Becker, Okafor, Santos, Lindqvist, Patel, Moreau, Tanaka, Novak, Reyes, Fischer, Haddad, Quinn, Larsen, Costa, Weber, Mensah, Romano,
    Keller, Suzuki,
    Ivanova, Doyle, Hansen, Ortiz, Bauer, Nakamura, Silva, Petrov, Lambert, Diallo, Murray, Castro, Eriksen, Rahman, Vogel, Lindgren, Osei, Marino,
    Walsh,
    Kowalski, Duarte, Schmitt, Abbott, Iqbal, Brandt, Vargas, Hayes, Sato, Bell, Jensen, Khan, Rossi, Frost, Medina, Porter, Adeyemi, Klein,
    Flores, Hale,
    Yamada, Berg, Carter, Nowak, Sharma, Dupont, Greer, Molina, Lund, Achebe, Winter""")

CITIES = words("""
    Lyon, Oslo, Nairobi, Lima, Dublin, Osaka, Porto, Chicago, Vienna, Toronto, Accra, Seville, Geneva, Boston, Jakarta, Prague, Denver, Turin,
    Hamburg, Quito,
    Helsinki, Manila, Leeds, Austin, Zurich, Lagos, Krakow, Montreal, Valencia, Seoul, Bristol, Antwerp, Dakar, Phoenix, Bergen, Bologna, Riga, Kyoto,
    Santiago, Glasgow, Bremen, Tunis, Portland, Ghent, Hanoi, Naples, Cologne, Auckland, Tampa, Malmo, Bogota, Nice, Cardiff, Utrecht, Perth, Cork,
    Delhi,
    Basel, Casablanca, Tallinn, Sydney, Graz, Memphis, Rotterdam""")

COMPANY_STEMS = words("""
    Norvik, Brightwell, Halden, Sunmere, Castellan, Oakridge, Pelora, Tidewater, Lumenta, Greyfield, Marlowe, Zentra, Ashcombe, Bluepine, Kestrel,
    Orvane,
    Harrow, Silverton, Belmar, Quillon, Northgate, Vantor, Redmoor, Elmsworth, Fenwick, Coralis, Stonebridge, Aldera, Windrush, Mirabel,
    Copperline, Juno Park,
    Talvera, Westmark, Ironleaf, Solvane, Brackwater, Everly, Highmoor, Larkfield, Medora, Rivenhall, Ostara, Pinecrest, Calder, Thornbury,
    Viridia, Amberley""")

COMPANY_KINDS = words("""
    Foods, Logistics, Energy, Textiles, Software, Motors, Bank, Chemicals, Airlines, Insurance, Robotics, Paper, Pharma, Media, Steel, Telecom,
    Toys, Furniture,
    Shipping, Hotels""")

SHOP_ITEMS = words("""
    kettle, desk lamp, backpack, phone case, rain jacket, coffee grinder, office chair, yoga mat, keyboard, running vest, blender, wall clock,
    sleeping bag,
    headset, bookshelf, toaster, bike helmet, winter coat, garden hose, tablet stand, air fryer, monitor, suitcase, hiking pole, water bottle,
    vacuum cleaner,
    bath towel, electric razor, chess set, camping stove, wool blanket, smart watch, tea pot, picture frame, door mat, dumbbell set, hair dryer,
    board game,
    tent, power bank, rice cooker, mirror, baby monitor, umbrella, speaker, frying pan, curtain rail, straw hat, router, knife set, printer, pillow,
    skateboard,
    face cream, lunch box, fan heater, laptop sleeve, tool box, sun hat, dog bed""")

COUNTED_THINGS = words("""
    apples, stickers, marbles, pencils, cookies, postcards, shells, balloons, muffins, stamps, lemons, buttons, books, coins, tulips, eggs, beads,
    tickets,
    oranges, candles, magnets, peaches, badges, plates, notebooks, acorns, pears, ribbons, tomatoes, photos, crayons, cupcakes, keys, toy cars,
    walnuts, posters""")

CONTAINERS = words("boxes, bags, baskets, jars, crates, trays, bowls, packets, drawers, buckets, tins, sacks")

MONTHS = words("January, February, March, April, May, June, July, August, September, October, November, December")
WEEKDAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

ORDINAL_WORDS = words("""
    first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, eleventh, twelfth, thirteenth, fourteenth, fifteenth, sixteenth,
    seventeenth,
    eighteenth, nineteenth, twentieth, twenty-first, twenty-second, twenty-third, twenty-fourth, twenty-fifth, twenty-sixth, twenty-seventh,
    twenty-eighth,
    twenty-ninth, thirtieth, thirty-first""")

NUMBER_WORDS = words("zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..., 11th, ..., 21st."""
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
